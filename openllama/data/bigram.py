"""A bigram model: what a language model has to beat to have learned anything beyond neighbours."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .cache import TokenCache


def bigram_loss(train: Iterable[TokenCache], valid: Iterable[TokenCache]) -> float:
    """Cross-entropy of `valid` under a bigram model of all of `train`, caches of one tokenizer, in nats per token.

    Witten-Bell smoothing (1991): after token a, the counts of pairs (a, b) get the weight N / (N + T) for N pairs seen
    and T different ones, add-one unigrams the rest. Labels are those the packed loader gives: all but each first token.
    """
    train = list(train)
    vocab = train[0].vocab_size
    first, second = _pairs(train)
    unigram = (np.bincount(second, minlength=vocab) + 1) / (len(second) + vocab)
    codes, counts = np.unique(first * vocab + second, return_counts=True)
    seen = np.bincount(first, minlength=vocab)  # N of each first token
    different = np.bincount(codes // vocab, minlength=vocab)  # T

    first, second = _pairs(valid)
    wanted = first * vocab + second
    at = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    pair_count = np.where(codes[at] == wanted, counts[at], 0)
    total = np.maximum(seen[first] + different[first], 1)
    unseen_share = np.where(seen[first] > 0, different[first] / total, 1.0)
    return float(-np.log(pair_count / total + unseen_share * unigram[second]).mean())


def _pairs(caches: Iterable[TokenCache]) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring tokens of all documents, none across a border."""
    pairs = []
    for cache in caches:
        ids = np.asarray(cache.ids, dtype=np.int64)
        inside = np.ones(len(ids), bool)
        inside[cache.offsets[:-1].astype(np.int64)] = False  # a document's first token follows nothing
        at = np.flatnonzero(inside)
        pairs.append((ids[at - 1], ids[at]))
    first, second = map(np.concatenate, zip(*pairs))
    return first, second
