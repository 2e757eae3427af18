"""Packed batches: every label once an epoch, in an order that (seed, epoch) fixes, resumable anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .cache import TokenCache
from .pack import fill
from .packed import pack_sources
from .twin import mixed

STATE_VERSION = 3


@dataclass
class Batch:
    """Packed pieces of documents, flat. `tokens` is always batch * context; padding closes each pack as a
    piece of its own."""

    ids: torch.Tensor  # int64 (tokens,)
    labels: torch.Tensor  # int64 (tokens,), pack.IGNORED on padding
    positions: torch.Tensor  # int32 (tokens,), from 0 in each piece
    cu_seqlens: torch.Tensor  # int32 (pieces + 1,), where each piece starts, and the end
    max_seqlen: int  # tokens of the longest piece
    targets: int  # labels that count


class Piece(NamedTuple):
    """A run of tokens of one document in a pack."""

    source: str
    document: int
    start: int  # token of the document
    length: int  # inputs


class PackedLoader:
    """Endless iterator of the batches of one rank.

    Of each world_size * batch packs in an epoch's order, rank r takes the r-th batch. Packs missing at the
    end of an epoch are all padding, so every rank has the same number of batches. `state_dict` is small and
    resumes at once, with another batch or world size too; state counts packs of all ranks, so any rank's
    state serves all.

    Args:
        sources: a token cache, or several by name, all of one tokenizer.
        context: inputs in a pack.
        batch: packs in a batch.
        mix: how often an epoch takes the packs of a source or a category ("pile", "Github", or "pile/Github" where
            only that source's category is meant): 2 takes them twice, 0.5 takes half of them and goes on with
            the rest in the next epoch, 0 takes none. What is not named counts 1. Groups with a weight of their own
            share no packs.
        long: what becomes of documents longer than the context: see `pack.pack`.
        keep: a folder that keeps the packs, so that the processes of a run share them: see `packed.pack_sources`.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        sources: TokenCache | Mapping[str, TokenCache],
        context: int,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        mix: Mapping[str, float] | None = None,
        long: str = "split",
        keep: str | Path | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, takes a whole number of at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}, takes 0 to world_size - 1 = {world_size - 1}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed: got {seed}, takes a whole number from 0 to below 2^32")
        self.sources = {"": sources} if isinstance(sources, TokenCache) else dict(sources)
        self.context, self.batch, self.seed = context, batch, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.mix, self.long = dict(mix or {}), long
        _check_sources(self.sources)
        self._pad = next(iter(self.sources.values())).pad_id
        self._tokens = [cache.ids for cache in self.sources.values()]
        self._packs, self._groups = pack_sources(self.sources, context, self.mix, long, keep)
        self._count = len(self._packs.first) - 1
        if not self._count:
            raise ValueError(
                "sources: got no document of two tokens or more, which one label takes; give more text"
            )
        self.epoch = self.next_pack = 0
        self._drawn, self._drawn_epoch = self.draws(0), 0

    def _taken(self, group: int, epoch: int) -> range:
        """Of a group's endless row of packs, shuffled anew each turn, those of an epoch."""
        each = self._groups[group].weight * self._groups[group].count
        return range(ceil(epoch * each), ceil((epoch + 1) * each))

    @property
    def packs(self) -> int:
        """Packs in this epoch; with a mix, epochs may differ by one a group."""
        return self._size(self.epoch)

    def _size(self, epoch: int) -> int:
        return sum(len(self._taken(group, epoch)) for group in range(len(self._groups)))

    @property
    def targets_per_epoch(self) -> int:
        """Labels in an epoch; with a mix, on average."""
        return round(sum(group.weight * group.targets for group in self._groups))

    @property
    def padding_share(self) -> float:
        """Share of an epoch's tokens that is padding (without the packs that fill up its last batch)."""
        targets = sum(group.weight * group.targets for group in self._groups)
        room = sum(group.weight * group.count * self.context for group in self._groups)
        return 1 - float(targets / room)

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.packs // (self.world_size * self.batch))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._draw()
        while self.next_pack >= len(self._drawn):  # an epoch of a few packs with small weights may take none
            self.epoch, self.next_pack = self.epoch + 1, 0
            self._draw()
        made = self._make(self._drawn, self.next_pack)
        self.next_pack = min(self.next_pack + self.world_size * self.batch, len(self._drawn))
        return made

    def _draw(self) -> None:
        if self._drawn_epoch != self.epoch:
            self._drawn, self._drawn_epoch = self.draws(self.epoch), self.epoch

    def one_epoch(self) -> Iterator[Batch]:
        """This rank's batches of epoch 0, always the same, without touching the loader's state: for validation.

        Its first batches are a fair sample of the corpus, for epoch 0 is shuffled too (unless shuffle is off).
        """
        draws = self.draws(0)
        for first in range(0, len(draws), self.world_size * self.batch):
            yield self._make(draws, first)

    def state_dict(self) -> dict[str, Any]:
        """Where to go on, of constant size; JSON can hold it."""
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "next_pack": self.next_pack,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was saved; refuses a state of another corpus, tokenizer, context, seed, order or
        mix."""
        for name, mine in {"version": STATE_VERSION, **self._identity()}.items():
            if state.get(name) != mine:
                raise ValueError(
                    f"loader state: {name} is {state.get(name)!r}, this loader has {mine!r}; resume with what "
                    "the state was saved with, or start without it"
                )
        epoch, next_pack = state.get("epoch", -1), state.get("next_pack", -1)
        whole = type(epoch) is type(next_pack) is int
        if not whole or epoch < 0 or not 0 <= next_pack <= self._size(epoch):
            raise ValueError(
                f"loader state: got epoch {epoch!r}, next_pack {next_pack!r}, takes whole numbers within the epoch's packs"
            )
        self.epoch, self.next_pack = epoch, next_pack

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": " ".join(
                f"{name}={cache.fingerprint}" if name else cache.fingerprint
                for name, cache in self.sources.items()
            ),
            "context": self.context,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "mix": self.mix,
            "long": self.long,
        }

    def order(self, epoch: int) -> np.ndarray:
        """The numbers of an epoch's packs: a weight of 0.5 takes every pack of its group once in two epochs."""
        return self.draws(epoch) % self._count

    def draws(self, epoch: int) -> np.ndarray:
        """An epoch's packs, each as turn * count + number: how often its group was gone through before, and which."""
        parts = [np.empty(0, np.int64)]
        for i, group in enumerate(self._groups):
            taken = self._taken(i, epoch)
            for turn in range(taken.start // group.count, -(-taken.stop // group.count)) if taken else ():
                a, b = (min(max(t - turn * group.count, 0), group.count) for t in (taken.start, taken.stop))
                packs = self._permutation(group.count, turn, i)[a:b] + group.first
                parts.append(packs + turn * self._count)
        draws = np.concatenate(parts)
        if len(self._groups) == 1:
            return draws
        return draws[self._permutation(len(draws), epoch, len(self._groups))]

    def pieces(self, draw: int) -> list[Piece]:
        """What a pack is made of, as one of `draws` takes it."""
        turn, pack = divmod(int(draw), self._count)
        key, found, caches = self._key(turn), [], list(self.sources.items())
        base = np.cumsum([0, *(cache.tokens for _, cache in caches)])
        for i in range(int(self._packs.first[pack]), int(self._packs.first[pack + 1])):
            at = int(self._packs.source[i])
            if len(self._packs.slack) and (slack := int(self._packs.slack[i])):
                at += mixed(key ^ mixed(i)) % (slack + 1)
            file = int(np.searchsorted(base, at, side="right")) - 1
            name, cache = caches[file]
            offsets = cache.offsets.view(np.int64)  # as uint64, all of it would become floats first
            document = int(np.searchsorted(offsets, at - base[file], side="right")) - 1
            start = int(at - base[file] - offsets[document])
            found.append(Piece(name, document, start, int(self._packs.length[i])))
        return found

    def _key(self, turn: int) -> int:
        """Fixes where sampled pieces start: elsewhere in each turn, so that no two takes of a document need be alike."""
        return mixed(mixed(self.seed) ^ turn)

    def _permutation(self, count: int, turn: int, group: int) -> np.ndarray:
        """RandomState, not Generator: only its streams are promised to stay the same in later numpy
        releases."""
        if not self.shuffle:
            return np.arange(count)
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, turn, *([group] if group else [])]))
        return np.random.RandomState(bits).permutation(count)

    def _make(self, draws: np.ndarray, first: int) -> Batch:
        """This rank's batch of the group that starts at number `first` of `draws`."""
        mine = first + self.rank * self.batch
        turns, packs = np.divmod(draws[mine : mine + self.batch], self._count)
        keys = np.array([self._key(turn) for turn in turns.tolist()], np.uint64)
        ids, labels, positions, cu_seqlens, max_seqlen, targets = fill(
            self._tokens, self._packs, packs, self.batch, self.context, self._pad, keys
        )
        ids, labels, positions, cu_seqlens = map(torch.from_numpy, (ids, labels, positions, cu_seqlens))
        return Batch(ids, labels, positions, cu_seqlens, max_seqlen, targets)


def _check_sources(sources: Mapping[str, TokenCache]) -> None:
    if not sources:
        raise ValueError("sources: got none, takes at least one token cache")
    first = next(iter(sources.values()))
    for name, cache in sources.items():
        mine = (cache.vocab_size, cache.pad_id, cache.ids.dtype)
        if mine != (first.vocab_size, first.pad_id, first.ids.dtype):
            raise ValueError(
                f"sources: {name} has {cache.vocab_size} pieces, pad id {cache.pad_id} and {cache.ids.dtype} ids, the "
                f"first has {first.vocab_size}, {first.pad_id} and {first.ids.dtype}; tokenise all with one tokenizer"
            )
