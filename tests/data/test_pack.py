import sys

import numpy as np
import pytest

from openllama.data import pack as pack_module
from openllama.data import twin
from openllama.data.pack import IGNORED, LONG, Packs, fill, host, pack
from openllama.info import report


@pytest.fixture(params=["native", "twin"], autouse=True)
def implementation(request, monkeypatch):
    """Every test runs on the native module, which must be built here, and on its twin."""
    module = host() if request.param == "native" else twin
    assert (module is twin) == (request.param == "twin"), "openllama.data._host is not built"
    monkeypatch.setattr(pack_module, "host", lambda: module)
    return request.param


def packed(tokens, context, long="split"):
    tokens = np.asarray(tokens, np.int64)
    return pack(np.cumsum(tokens) - tokens, tokens, context, long)


def by_pack(p):
    slack = p.slack if len(p.slack) else np.zeros_like(p.source)
    return [
        list(zip(p.source[a:b].tolist(), p.length[a:b].tolist(), slack[a:b].tolist()))
        for a, b in zip(p.first[:-1].tolist(), p.first[1:].tolist())
    ]


def test_by_hand():
    tokens = [7, 0, 1, 2, 5, 9]  # labels 6, -, -, 1, 4, 8; they begin at 0, 7, 7, 8, 10, 15
    assert by_pack(packed(tokens, 4)) == [
        [(0, 4, 0)],
        [(10, 4, 0)],
        [(15, 4, 0)],
        [(19, 4, 0)],
        [(4, 2, 0), (8, 1, 0)],
    ]
    assert by_pack(packed(tokens, 4, "truncate")) == [[(0, 4, 0)], [(10, 4, 0)], [(15, 4, 0)], [(8, 1, 0)]]
    assert by_pack(packed(tokens, 4, "sample")) == [[(0, 4, 2)], [(10, 4, 0)], [(15, 4, 4)], [(8, 1, 0)]]


def test_each_token_but_the_first_is_a_label_once():
    rng = np.random.default_rng(0)
    for context in (1, 2, 3, 7, 64, 1000):
        tokens = rng.integers(0, 200, 50)
        p, counted = packed(tokens, context), np.zeros(tokens.sum(), int)
        for source, length in zip(p.source, p.length):
            counted[source + 1 : source + 1 + length] += 1
        wanted = np.ones(tokens.sum(), int)
        wanted[(np.cumsum(tokens) - tokens)[tokens > 0]] = 0
        assert (counted == wanted).all() and not len(p.slack)


def slow_best_fit(lengths, capacity):
    """The definition: longest first, each into the fullest bin that takes it (of those, the one last touched)."""
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


def test_equals_the_definition_of_best_fit():
    rng = np.random.default_rng(1)
    for _ in range(100):
        context = int(rng.integers(1, 40))
        tokens = rng.integers(2, context + 2, rng.integers(0, 120))
        p, start = packed(tokens, context), np.cumsum(tokens) - tokens
        bins = np.array(slow_best_fit((tokens - 1).tolist(), context), int)
        wanted = [start[bins == b].tolist() for b in range(bins.max(initial=-1) + 1)]
        assert [[s for s, _, _ in pieces] for pieces in by_pack(p)] == wanted


@pytest.mark.parametrize("long", LONG)
@pytest.mark.parametrize("context", [1, 63, 64, 65, 1000, 4096, 5000, 300_000])
def test_equals_its_twin(context, long):
    rng = np.random.default_rng(context)
    for count in (0, 1, 1000):
        tokens = (rng.pareto(0.7, count) * 30).astype(np.int64) % 2_000_000
        start = np.cumsum(tokens) - tokens
        mine, theirs = pack(start, tokens, context, long), Packs(*twin.pack(start, tokens, context, long))
        for a, b in zip(mine, theirs):
            assert a.dtype == b.dtype and np.array_equal(a, b)
        filled = np.add.reduceat(mine.length, mine.first[:-1]) if len(mine.length) else np.zeros(0)
        assert filled.max(initial=0) <= context and filled.min(initial=1) > 0


def test_many_documents_leave_little_room():
    tokens = np.random.default_rng(2).integers(2, 1026, 100_000)
    p = packed(tokens, 1024)
    assert p.length.sum() > 0.99 * 1024 * (len(p.first) - 1)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("long", LONG)
def test_batches_equal_the_twins(dtype, long):
    rng = np.random.default_rng(3)
    files = [rng.integers(0, 60_000, n).astype(dtype) for n in (5000, 1, 7000)]
    tokens = rng.integers(0, 300, 70)
    tokens[35] += 12_001 - tokens.sum()
    tokens[:35] = np.diff(np.linspace(0, 5000, 36).astype(int))  # a document never reaches into the next file
    tokens[35:] = [1, *np.diff(np.linspace(0, 7000, 35).astype(int))]
    p = packed(tokens, 50, long)
    for key in (0, 1, 2**64 - 8):
        packs = rng.permutation(len(p.first) - 1)[:7]
        keys = np.arange(7, dtype=np.uint64) + np.uint64(key)
        made = fill(files, p, packs, 9, 50, 3, keys)
        wanted = twin.fill(files, *p, packs, 9, 50, 3, IGNORED, keys)
        for a, b in zip(made, wanted):
            assert np.array_equal(a, b) and getattr(a, "dtype", int) == getattr(b, "dtype", int)


def test_sampled_pieces_start_everywhere_and_stay_inside():
    ids = np.arange(100, dtype=np.uint16)
    p = packed([100], 10, "sample")
    packs, keys = np.zeros(3000, np.int64), np.arange(3000, dtype=np.uint64)
    starts = fill([ids], p, packs, 3000, 10, 0, keys)[0][::10].tolist()
    assert set(starts) == set(range(90))  # 99 labels, 10 of them a piece
    assert max(np.bincount(starts)) < 70  # 33 each on average


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="context: got 0"):
        packed([3], 0)
    with pytest.raises(ValueError, match="long: got 'drop', takes split, sample, truncate"):
        packed([3], 4, "drop")
    with pytest.raises(ValueError, match="tokens: got 1 documents, start has 2"):
        pack(np.zeros(2, np.int64), np.ones(1, np.int64), 4)


def test_native_refuses_what_lies_outside(implementation):
    if implementation == "twin":
        return
    ids, p = np.arange(20, dtype=np.uint16), packed([20], 10)
    one, key = np.array([0]), np.zeros(1, np.uint64)
    for broken in (
        p._replace(source=p.source + 15),
        p._replace(source=p.source - 1),
        p._replace(length=p.length + 1),
        p._replace(first=p.first + 5),
    ):
        with pytest.raises(IndexError):
            fill([ids], broken, one, 1, 10, 0, key)
    with pytest.raises(IndexError):
        fill([ids], p, np.array([7]), 1, 10, 0, key)
    with pytest.raises(IndexError):
        fill([ids], p, np.array([-1]), 1, 10, 0, key)
    with pytest.raises(IndexError):
        fill([ids], packed([20], 10, "sample"), one, 1, 10, 0, key[:0])
    with pytest.raises(TypeError):
        fill([ids.astype(np.int64)], p, one, 1, 10, 0, key)


def test_without_the_native_module_its_twin_serves_with_a_warning(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "openllama.data._host", None)
    monkeypatch.delattr("openllama.data._host")
    host.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"_host is not built .*pip install --no-build-isolation"):
            assert host() is twin
        assert "packing" in report() and "in numpy: the host module is not built" in report()
    finally:
        host.cache_clear()
