"""csrc/host/host.cpp in numpy: its definition, its oracle in the tests, and its stand-in where it is not built."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(
    start: np.ndarray, tokens: np.ndarray, context: int, long: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    document, offset, length = cut(tokens, context, long).T
    bins = best_fit(length, context)
    order = np.argsort(bins, kind="stable")  # within a pack, pieces keep the corpus's order
    first = np.concatenate([[0], np.cumsum(np.bincount(bins))]).astype(np.int64)
    slack = (
        np.maximum(tokens[document] - 1 - context, 0)[order] if long == "sample" else np.empty(0, np.int64)
    )
    return (start[document] + offset)[order], length[order].astype(np.int32), slack, first


def cut(tokens: np.ndarray, context: int, long: str) -> np.ndarray:
    """Cuts documents into pieces of at most `context` inputs: int64 rows (document, start, length).

    A document of n tokens has n - 1 labels. A piece reads tokens start .. start + length: all but the last
    are inputs, all but the first are labels. So neighbours share one token, and each token but a document's
    first is a label exactly once:

        tokens       0 1 2 3 4 5 6          context 4
        inputs       0 1 2 3 | 4 5
        labels         1 2 3   4 | 5 6

    Where `long` is not "split", a document gives its first piece only.
    """
    labels = np.maximum(np.asarray(tokens, np.int64) - 1, 0)
    if long != "split":
        labels = np.minimum(labels, context)
    pieces = -(-labels // context)
    document = np.repeat(np.arange(len(labels)), pieces)
    first = np.cumsum(pieces) - pieces  # row of each document's first piece
    start = (np.arange(len(document)) - first[document]) * context
    return np.stack([document, start, np.minimum(context, labels[document] - start)], axis=1)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: the bin number (from 0) of each piece, so that no bin holds more than `capacity` tokens.

    The longest piece goes first, each into the fullest bin that still takes it, else into a new one; ties go
    to the earlier piece and the bin last touched. Linear: bins are kept by their remaining room, a bit mask
    of rooms finds the tightest.
    """
    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, count = 0, 0  # bit r of rooms: some bin has room for r more tokens
    for piece, length in zip(order.tolist(), lengths[order].tolist()):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, number, count = capacity, count, count + 1
        if left := room - length:
            by_room[left].append(number)
            rooms |= 1 << left
        bins[piece] = number
    return bins


def fill(
    tokens: Sequence[np.ndarray],
    source: np.ndarray,
    length: np.ndarray,
    slack: np.ndarray,
    first: np.ndarray,
    packs: np.ndarray,
    batch: int,
    context: int,
    pad: int,
    ignored: int,
    keys: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, int]:
    ids = np.full(batch * context, pad, np.int64)
    labels = np.full(batch * context, ignored, np.int64)
    borders, targets = [0], 0
    base = np.cumsum([0, *map(len, tokens)])
    for b in range(batch):
        pieces = range(int(first[packs[b]]), int(first[packs[b] + 1])) if b < len(packs) else ()
        for i in pieces:
            start, size, at = int(source[i]), int(length[i]), borders[-1]
            if len(slack) and slack[i]:
                start += mixed(int(keys[b]) ^ mixed(i)) % (int(slack[i]) + 1)
            file = int(np.searchsorted(base, start, side="right")) - 1
            run = tokens[file][start - base[file] : start - base[file] + size + 1]
            ids[at : at + size], labels[at : at + size] = run[:-1], run[1:]
            borders.append(at + size)
            targets += size
        if borders[-1] < (b + 1) * context:
            borders.append((b + 1) * context)  # padding closes a pack as a piece of its own
    sizes = np.diff(borders)
    positions = np.arange(batch * context) - np.repeat(borders[:-1], sizes)
    return ids, labels, positions.astype(np.int32), np.array(borders, np.int32), int(sizes.max()), targets


def mixed(x: int) -> int:
    """splitmix64's finaliser (Steele, Lea, Flood, 2014)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)
