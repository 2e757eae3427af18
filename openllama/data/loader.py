"""Packed batches: every label once an epoch, in an order that (seed, epoch) fixes, resumable anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .cache import TokenCache
from .pack import best_fit, cut

IGNORED = -100  # label of padding, as in PyTorch's cross-entropy
STATE_VERSION = 1


@dataclass
class Batch:
    """Packed pieces of documents, flat. `tokens` is always batch * context; padding closes each pack as a
    piece of its own."""

    ids: torch.Tensor  # int64 (tokens,)
    labels: torch.Tensor  # int64 (tokens,), IGNORED on padding
    positions: torch.Tensor  # int32 (tokens,), from 0 in each piece
    cu_seqlens: torch.Tensor  # int32 (pieces + 1,), where each piece starts, and the end
    max_seqlen: int  # tokens of the longest piece
    targets: int  # labels that count


class PackedLoader:
    """Endless iterator of the batches of one rank.

    Of each world_size * batch packs in an epoch's order, rank r takes the r-th batch. Packs missing at the
    end of an epoch are all padding, so every rank has the same number of batches. `state_dict` is small and
    resumes at once, with another batch or world size too; state counts packs of all ranks, so any rank's
    state serves all.
    """

    def __init__(
        self,
        cache: TokenCache,
        context: int,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        for name, value in (("batch", batch), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, takes a whole number of at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}, takes 0 to world_size - 1 = {world_size - 1}")
        if seed < 0:
            raise ValueError(f"seed: got {seed}, takes a whole number of at least 0")
        self.cache, self.context, self.batch, self.seed = cache, context, batch, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.epoch = self.next_pack = 0
        self._pack_pieces()
        self._order, self._order_epoch = self._permutation(0), 0

    def _pack_pieces(self) -> None:
        pieces = cut(self.cache.lengths, self.context)
        bins = best_fit(pieces[:, 2], self.context)
        by_bin = np.argsort(bins, kind="stable")  # within a pack, pieces keep the corpus's order
        document, start, length = pieces[by_bin].T
        self._source = (
            self.cache.offsets[document].astype(np.int64) + start
        )  # where each piece's first token lies
        self._length = length
        self._first = np.concatenate(
            [[0], np.cumsum(np.bincount(bins))]
        )  # (packs + 1,) first piece of each pack
        self.packs = len(self._first) - 1
        self.targets_per_epoch = int(length.sum())

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
            self._order, self._order_epoch = self._permutation(self.epoch), self.epoch
        made = self._make(self._order, self.next_pack)
        self.next_pack = min(self.next_pack + self.world_size * self.batch, self.packs)
        return made

    def one_epoch(self) -> Iterator[Batch]:
        """This rank's batches of epoch 0, always the same, without touching the loader's state: for validation.

        Its first batches are a fair sample of the corpus, for epoch 0 is shuffled too (unless shuffle is off).
        """
        order = self._permutation(0)
        for first in range(0, self.packs, self.world_size * self.batch):
            yield self._make(order, first)

    def state_dict(self) -> dict[str, Any]:
        """Where to go on, of constant size; JSON can hold it."""
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "next_pack": self.next_pack,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was saved; refuses a state of another corpus, tokenizer, context, seed or
        shuffle."""
        for name, mine in {"version": STATE_VERSION, **self._identity()}.items():
            if state.get(name) != mine:
                raise ValueError(
                    f"loader state: {name} is {state.get(name)!r}, this loader has {mine!r}; resume with what "
                    "the state was saved with, or start without it"
                )
        epoch, next_pack = state["epoch"], state["next_pack"]
        if epoch < 0 or not 0 <= next_pack <= self.packs:
            raise ValueError(
                f"loader state: got epoch {epoch}, next_pack {next_pack}, takes at most {self.packs} packs"
            )
        self.epoch, self.next_pack = epoch, next_pack

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.cache.fingerprint,
            "context": self.context,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _permutation(self, epoch: int) -> np.ndarray:
        """RandomState, not Generator: only its streams are promised to stay the same in later numpy
        releases."""
        if not self.shuffle:
            return np.arange(self.packs)
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, epoch]))
        return np.random.RandomState(bits).permutation(self.packs)

    def _make(self, order: np.ndarray, first: int) -> Batch:
        """This rank's batch of the group that starts at pack `first` of `order`."""
        mine = first + self.rank * self.batch
        source, length, real = self._layout(order[mine : mine + self.batch])
        total = self.batch * self.context
        end = np.cumsum(length)
        begin = end - length
        positions = np.arange(total) - np.repeat(begin, length)  # (tokens,)
        padding = np.repeat(~real, length)
        at = np.where(padding, 0, np.repeat(source, length) + positions)  # where each input lies in the cache
        ids, labels = self.cache.ids[at].astype(np.int64), self.cache.ids[at + 1].astype(np.int64)
        ids[padding], labels[padding] = self.cache.pad_id, IGNORED
        return Batch(
            ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            positions=torch.from_numpy(positions.astype(np.int32)),
            cu_seqlens=torch.from_numpy(np.concatenate([[0], end]).astype(np.int32)),
            max_seqlen=int(length.max()),
            targets=int(length[real].sum()),
        )

    def _layout(self, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, length, is it real) of each piece of a batch, padding pieces included."""
        source: list[np.ndarray] = []
        length: list[np.ndarray] = []
        real: list[np.ndarray] = []
        missing = self.batch - len(packs)
        for a, b in [(int(self._first[p]), int(self._first[p + 1])) for p in packs] + [(0, 0)] * missing:
            room = self.context - int(self._length[a:b].sum())
            source += [self._source[a:b], _ZERO[: room > 0]]
            length += [self._length[a:b], np.array([room])[: room > 0]]
            real += [np.ones(b - a, bool), np.zeros(int(room > 0), bool)]
        return np.concatenate(source), np.concatenate(length), np.concatenate(real)


_ZERO = np.zeros(1, np.int64)
