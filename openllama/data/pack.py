"""Documents to pieces to packs: cutting at the context length, and best-fit packing."""

from __future__ import annotations

import numpy as np


def cut(lengths: np.ndarray, context: int) -> np.ndarray:
    """Cuts documents into pieces of at most `context` inputs: int64 rows (document, start, length).

    A document of n tokens has n - 1 labels. A piece reads tokens start .. start + length: all but the last
    are inputs, all but the first are labels. So neighbours share one token, and each token but a document's
    first is a label exactly once:

        tokens       0 1 2 3 4 5 6          context 4
        inputs       0 1 2 3 | 4 5
        labels         1 2 3   4 | 5 6
    """
    _positive("context", context)
    labels = np.maximum(np.asarray(lengths, np.int64) - 1, 0)
    pieces = -(-labels // context)
    document = np.repeat(np.arange(len(labels)), pieces)
    first = np.cumsum(pieces) - pieces  # row of each document's first piece
    start = (np.arange(len(document)) - first[document]) * context
    return np.stack([document, start, np.minimum(context, labels[document] - start)], axis=1)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: the bin number (from 0) of each piece, so that no bin holds more than `capacity`
    tokens.

    The longest piece goes first, each into the fullest bin that still takes it, else into a new one; ties go
    to the earlier piece and the bin last touched. Linear: bins are kept by their remaining room, a bit mask
    of rooms finds the tightest.
    """
    _positive("capacity", capacity)
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths: got {lengths.min()} to {lengths.max()}, takes 1 to capacity={capacity}")
    order = np.argsort(-lengths, kind="stable")
    full = int(np.searchsorted(-lengths[order], -capacity, side="right"))  # these fill a bin each
    bins = np.empty(len(lengths), np.int64)
    bins[order[:full]] = np.arange(full)
    by_room: list[list[int]] = [[] for _ in range(capacity)]
    rooms, count, chosen = 0, full, []  # bit r of rooms: some bin has room for r more tokens
    for length in lengths[order[full:]].tolist():
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
        chosen.append(number)
    bins[order[full:]] = chosen
    return bins


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: got {value}, takes a whole number of at least 1")
