"""The bigram baseline against a plain dictionary version of the same formula."""

import math
from collections import Counter
from itertools import pairwise

import pytest

from openllama.data.bigram import bigram_loss


def naive(train, valid, vocab):
    pairs = Counter(p for d in train for p in pairwise(d))
    first, second = Counter(a for a, _ in pairs.elements()), Counter(b for _, b in pairs.elements())
    different = Counter(a for a, _ in pairs)
    total = sum(second.values())

    def probability(a, b):
        unigram = (second[b] + 1) / (total + vocab)
        if not first[a]:
            return unigram
        return (pairs[a, b] + different[a] * unigram) / (first[a] + different[a])

    for a in (1, 5, 9):
        assert sum(probability(a, b) for b in range(vocab)) == pytest.approx(1)
    wanted = [p for d in valid for p in pairwise(d)]
    return -sum(math.log(probability(a, b)) for a, b in wanted) / len(wanted)


def test_equals_the_formula_and_no_pair_crosses_a_border(cache_of):
    train = [[1, 5, 6, 5, 6, 2], [1, 7, 2], [1, 5, 5, 2]]
    valid = [[1, 5, 6, 2], [1, 8, 8, 2]]  # 8 never occurs in train
    caches = cache_of(train, "train"), cache_of(valid, "valid")
    expected = naive(train, valid, caches[0].vocab_size)
    assert bigram_loss(caches[:1], caches[1:]) == pytest.approx(expected, rel=1e-9)


def test_several_sources_count_as_one_text(cache_of):
    train = [[1, 5, 6, 2], [1, 5, 7, 2]], [[1, 9, 6, 5, 2]]
    valid = [[1, 5, 6, 2]], [[1, 9, 5, 2], [1, 6, 6, 2]]
    caches = [
        [cache_of(documents, f"{split}{i}") for i, documents in enumerate(sources)]
        for split, sources in (("train", train), ("valid", valid))
    ]
    expected = naive([*train[0], *train[1]], [*valid[0], *valid[1]], caches[0][0].vocab_size)
    assert bigram_loss(*caches) == pytest.approx(expected, rel=1e-9)
