"""Packed batches: every label once an epoch, in an order that (seed, epoch) fixes, resumable anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .cache import TokenCache
from .pack import Packs, fill, pack
from .twin import mixed

STATE_VERSION = 2


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
            the rest in the next epoch, 0 takes none. What is not named counts 1. Groups with a weight of their own share no packs.
        long: what becomes of documents longer than the context: see `pack.pack`.

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
    ) -> None:
        for name, value in (("batch", batch), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, takes a whole number of at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}, takes 0 to world_size - 1 = {world_size - 1}")
        if seed < 0:
            raise ValueError(f"seed: got {seed}, takes a whole number of at least 0")
        self.sources = {"": sources} if isinstance(sources, TokenCache) else dict(sources)
        self.context, self.batch, self.seed = context, batch, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.mix, self.long = dict(mix or {}), long
        _check_sources(self.sources, self.mix)
        self._pad = next(iter(self.sources.values())).pad_id
        self._tokens = [cache.ids for cache in self.sources.values()]
        self._pack_groups()
        self.epoch = self.next_pack = 0
        self._order, self._order_epoch = self.order(0), 0

    def _pack_groups(self) -> None:
        """Packs the documents of each weight by themselves, and counts what an epoch takes of them."""
        made: list[Packs] = []
        self._groups: list[tuple[int, int, int]] = []  # first pack, packs, packs taken in an epoch
        self.targets_per_epoch = pieces = packs = 0
        for weight, start, tokens in _by_weight(self.sources, self.mix):
            group = pack(start, tokens, self.context, self.long)
            count = len(group.first) - 1
            taken = round(weight * count)
            self._groups.append((packs, count, taken))
            self.targets_per_epoch += round(int(group.length.sum()) * taken / max(1, count))
            made.append(group._replace(first=group.first[:-1] + pieces))
            pieces, packs = pieces + len(group.length), packs + count
        if not packs or not any(taken for _, _, taken in self._groups):
            raise ValueError(
                f"sources: got {packs} packs, of which an epoch takes none (mix: {self.mix}); "
                "give longer documents or larger weights"
            )
        joined = Packs(*map(np.concatenate, zip(*made)))
        self._packs = joined._replace(first=np.append(joined.first, pieces))
        self.packs = sum(taken for _, _, taken in self._groups)

    @property
    def padding_share(self) -> float:
        """Share of an epoch's tokens that is padding (without the packs that fill up its last batch)."""
        return 1 - self.targets_per_epoch / (self.packs * self.context)

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.packs // (self.world_size * self.batch))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.next_pack >= self.packs:
            self.epoch, self.next_pack = self.epoch + 1, 0
        if self._order_epoch != self.epoch:
            self._order, self._order_epoch = self.order(self.epoch), self.epoch
        made = self._make(self._order, self.next_pack, self.epoch)
        self.next_pack = min(self.next_pack + self.world_size * self.batch, self.packs)
        return made

    def one_epoch(self) -> Iterator[Batch]:
        """This rank's batches of epoch 0, always the same, without touching the loader's state: for validation.

        Its first batches are a fair sample of the corpus, for epoch 0 is shuffled too (unless shuffle is off).
        """
        order = self.order(0)
        for first in range(0, self.packs, self.world_size * self.batch):
            yield self._make(order, first, 0)

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
        if epoch < 0 or not 0 <= next_pack <= self.packs:
            raise ValueError(
                f"loader state: got epoch {epoch}, next_pack {next_pack}, takes at most {self.packs} packs"
            )
        self.epoch, self.next_pack = epoch, next_pack

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": " ".join(cache.fingerprint for cache in self.sources.values()),
            "context": self.context,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "mix": self.mix,
            "long": self.long,
        }

    def order(self, epoch: int) -> np.ndarray:
        """The numbers of an epoch's packs. Each group is an endless row of permutations of its packs, of which every epoch takes
        the next part, so that a weight of 0.5 takes every pack once in two epochs."""
        parts = []
        for group, (first, count, taken) in enumerate(self._groups):
            begin, end = epoch * taken, (epoch + 1) * taken
            for turn in range(begin // count, -(-end // count)) if taken else ():
                a, b = max(begin - turn * count, 0), min(end - turn * count, count)
                parts.append(first + self._permutation(count, turn, group)[a:b])
        order = np.concatenate(parts)
        return (
            order
            if len(self._groups) == 1
            else order[self._permutation(len(order), epoch, len(self._groups))]
        )

    def pieces(self, pack: int) -> list[Piece]:
        """What a pack is made of. A sampled piece is given at its earliest start."""
        found, caches = [], list(self.sources.items())
        base = np.cumsum([0, *(cache.tokens for _, cache in caches)])
        for i in range(int(self._packs.first[pack]), int(self._packs.first[pack + 1])):
            at = int(self._packs.source[i])
            file = int(np.searchsorted(base, at, side="right")) - 1
            name, cache = caches[file]
            document = int(np.searchsorted(cache.offsets, at - base[file], side="right")) - 1
            start = int(at - base[file] - int(cache.offsets[document]))
            found.append(Piece(name, document, start, int(self._packs.length[i])))
        return found

    def _permutation(self, count: int, turn: int, group: int) -> np.ndarray:
        """RandomState, not Generator: only its streams are promised to stay the same in later numpy
        releases."""
        if not self.shuffle:
            return np.arange(count)
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, turn, *([group] if group else [])]))
        return np.random.RandomState(bits).permutation(count)

    def _make(self, order: np.ndarray, first: int, epoch: int) -> Batch:
        """This rank's batch of the group that starts at pack `first` of `order`."""
        mine = first + self.rank * self.batch
        key = mixed(mixed(self.seed % 2**64) ^ epoch)
        packs = order[mine : mine + self.batch]
        ids, labels, positions, cu_seqlens, max_seqlen, targets = fill(
            self._tokens, self._packs, packs, self.batch, self.context, self._pad, key
        )
        ids, labels, positions, cu_seqlens = map(torch.from_numpy, (ids, labels, positions, cu_seqlens))
        return Batch(ids, labels, positions, cu_seqlens, max_seqlen, targets)


def _check_sources(sources: Mapping[str, TokenCache], mix: Mapping[str, float]) -> None:
    if not sources:
        raise ValueError("sources: got none, takes at least one token cache")
    first = next(iter(sources.values()))
    for name, cache in sources.items():
        if (cache.vocab_size, cache.pad_id, cache.ids.dtype) != (
            first.vocab_size,
            first.pad_id,
            first.ids.dtype,
        ):
            raise ValueError(
                f"sources: {name} has {cache.vocab_size} pieces and pad id {cache.pad_id}, the first has "
                f"{first.vocab_size} and {first.pad_id}; tokenise all with one tokenizer"
            )
    known = {key for name, cache in sources.items() for key in _keys(name, cache)}
    for key, weight in mix.items():
        if key not in known:
            raise ValueError(f"mix: got {key!r}, takes names of {', '.join(sorted(known))}")
        if isinstance(weight, bool) or not 0 <= weight <= 1000:
            raise ValueError(f"mix: got {weight!r} for {key}, takes a number from 0 to 1000")


def _keys(name: str, cache: TokenCache) -> list[str]:
    return [*([name] if name else []), *cache.categories, *(f"{name}/{c}" for c in cache.categories if name)]


def _by_weight(
    sources: Mapping[str, TokenCache], mix: Mapping[str, float]
) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """(weight, start, tokens) of the documents of each weight; tokens count over all sources' files in a row."""
    starts, lengths, weights, base = [], [], [], 0
    for name, cache in sources.items():
        starts.append(cache.offsets[:-1].astype(np.int64) + base)
        lengths.append(cache.lengths)
        # a category of one source before one of any, before the whole source
        of_category = [
            float(mix.get(f"{name}/{c}", mix.get(c, mix.get(name, 1.0)))) for c in cache.categories
        ]
        weights.append(np.array(of_category)[cache.category_of])
        base += cache.tokens
    start, tokens, weight = map(np.concatenate, (starts, lengths, weights))
    values = np.unique(weight)
    for value in values:
        chosen = slice(None) if len(values) == 1 else weight == value
        yield float(value), start[chosen], tokens[chosen]
