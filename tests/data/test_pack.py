import numpy as np
import pytest

from openllama.data.pack import best_fit, cut


def test_cut_by_hand():
    pieces = cut(np.array([7, 0, 1, 2, 5, 9]), 4)
    assert pieces.tolist() == [[0, 0, 4], [0, 4, 2], [3, 0, 1], [4, 0, 4], [5, 0, 4], [5, 4, 4]]


def test_each_token_but_the_first_is_a_label_once():
    rng = np.random.default_rng(0)
    for context in (1, 2, 3, 7, 64, 1000):
        lengths = rng.integers(0, 200, 50)
        labels, inputs = ([np.zeros(n, int) for n in lengths] for _ in range(2))
        for document, start, length in cut(lengths, context):
            assert 1 <= length <= context
            inputs[document][start : start + length] += 1
            labels[document][start + 1 : start + length + 1] += 1
            assert start + length < lengths[document]
        for n, i, label in zip(lengths.tolist(), inputs, labels):
            assert i.tolist() == [1] * (n - 1) + [0] * (n > 0)
            assert label.tolist() == [0] * (n > 0) + [1] * (n - 1)


def test_cut_of_nothing():
    assert cut(np.zeros(0, np.int64), 8).shape == (0, 3)
    with pytest.raises(ValueError, match="context: got 0"):
        cut(np.array([3]), 0)


def slow_best_fit(lengths, capacity):
    """The definition: longest first, each into the fullest bin that takes it (of those, the one last
    touched)."""
    rooms, touched, bins = [], [], [0] * len(lengths)
    for clock, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fits = [b for b, room in enumerate(rooms) if room >= lengths[i]]
        if fits:
            chosen = min(fits, key=lambda b: (rooms[b], -touched[b]))
        else:
            chosen = len(rooms)
            rooms.append(capacity)
            touched.append(clock)
        rooms[chosen] -= lengths[i]
        touched[chosen], bins[i] = clock, chosen
    return bins


def test_best_fit_equals_its_definition():
    rng = np.random.default_rng(1)
    for _ in range(100):
        capacity = int(rng.integers(1, 40))
        lengths = rng.integers(1, capacity + 1, rng.integers(0, 120))
        assert best_fit(lengths, capacity).tolist() == slow_best_fit(lengths.tolist(), capacity)


def test_best_fit_of_many_leaves_little_room():
    lengths = np.random.default_rng(2).integers(1, 1025, 100_000)
    bins = best_fit(lengths, 1024)
    filled = np.bincount(bins, lengths)
    assert filled.max() <= 1024 and filled.min() > 0
    assert filled.mean() > 0.99 * 1024


def test_best_fit_errors():
    for wrong in ([0], [9], [3, -1]):
        with pytest.raises(ValueError, match="takes 1 to capacity=8"):
            best_fit(np.array(wrong), 8)
    with pytest.raises(ValueError, match="capacity: got 0"):
        best_fit(np.array([1]), 0)
    assert best_fit(np.zeros(0, int), 8).tolist() == []
