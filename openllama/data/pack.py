"""Documents to packs, and packs to batches: best-fit packing by whole documents, in the native host module."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from . import twin

IGNORED = -100  # label of padding, as in PyTorch's cross-entropy
LONG = ("split", "sample", "truncate")


class Packs(NamedTuple):
    """Pieces of documents in the order of their packs. Tokens are counted over all files of a corpus."""

    source: np.ndarray  # int64 (pieces,), where the first token lies
    length: np.ndarray  # int32 (pieces,), inputs; the labels lie one token further
    slack: np.ndarray  # int64 (pieces,), how much further on a sampled one may start; (0,) where none is
    first: np.ndarray  # int64 (packs + 1,), first piece of each pack, and the end


@functools.cache
def host() -> ModuleType:
    """The native module, or, with a warning, its twin."""
    try:
        from . import _host  # type: ignore[attr-defined]
    except ImportError as e:
        warnings.warn(
            f"openllama.data._host is not built for this Python ({e}): packing runs in numpy, much slower; "
            "build with `pip install --no-build-isolation -e .`",
            RuntimeWarning,
            stacklevel=2,
        )
        return twin
    return _host


def pack(start: np.ndarray, tokens: np.ndarray, context: int, long: str = "split") -> Packs:
    """Packs documents into rows of `context` inputs, by best fit (decreasing): whole documents wherever they fit.

    Args:
        start: int64 (documents,), where each document's tokens begin.
        tokens: int64 (documents,), their number; one of n tokens has n - 1 labels, so n < 2 gives nothing.
        context: inputs in a pack.
        long: what becomes of a document with more than `context` labels. "split": consecutive pieces that share one
            token, so that each token but the first is a label once. "sample": one piece, which starts elsewhere in each
            epoch. "truncate": its first piece.

    Raises:
        ValueError: naming the argument.
    """
    if not 1 <= context < 2**31:
        raise ValueError(f"context: got {context}, takes a whole number from 1 to below 2^31")
    if long not in LONG:
        raise ValueError(f"long: got {long!r}, takes {', '.join(LONG)}")
    if len(start) != len(tokens):
        raise ValueError(f"tokens: got {len(tokens)} documents, start has {len(start)}")
    made = host().pack(np.asarray(start, np.int64), np.asarray(tokens, np.int64), context, long)
    return Packs(*made)


def fill(
    tokens: Sequence[np.ndarray],
    packed: Packs,
    packs: np.ndarray,
    batch: int,
    context: int,
    pad: int,
    keys: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, int]:
    """A batch of packs, flat; those missing to `batch` are all padding, and padding closes a pack as its own piece.

    Args:
        tokens: the files' ids, uint16 or uint32, one dtype for all.
        packed: what `pack` made.
        packs: int64, at most `batch` numbers of packs.
        pad: id of padding; its labels are IGNORED.
        keys: uint64, of each of `packs`: fixes where its sampled pieces start.

    Returns:
        ids, labels: int64 (batch * context,); positions: int32, from 0 in each piece; cu_seqlens: int32 (pieces + 1,);
        the longest piece's tokens; the number of labels that count.
    """
    return host().fill(tokens, *packed, packs, batch, context, pad, IGNORED, keys)
