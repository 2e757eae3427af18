import pytest

from openllama.data.prepare import fraction
from openllama.data.sample import sample
from openllama.data.shards import ShardWriter


def sampled(folders, *args):
    return [d["text"] for d in sample(folders, *args)]


def test_samples_are_spread_and_the_same_every_time(shards_of):
    folder = shards_of([f"{i:05d}" for i in range(2000)])
    some = sampled({folder: None}, 2500)
    assert some == sampled({folder: None}, 2500) and 400 < len(some) < 600
    assert len(sampled({folder: None}, 10_000)) == 2000
    assert 0 <= fraction("a") < 1 and fraction("a") != fraction("a", "salt")


def test_samples_by_shard_and_category(tmp_path):
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name, {}, lines_per_shard=100) as writer:
            for i in range(1000):
                category = "odd" if i % 2 else "even"
                writer.write({"text": f"{name}{i:04d}", "meta": {"category": category}})
    a, b = tmp_path / "a", tmp_path / "b"
    got = sampled({a: 2, b: 5}, 10**9)
    assert got == [
        *(f"a{i:04d}" for s in (0, 5) for i in range(s * 100, s * 100 + 100)),
        *(f"b{i:04d}" for s in (0, 2, 4, 6, 8) for i in range(s * 100, s * 100 + 100)),
    ]
    assert {int(t[1:]) % 2 for t in sampled({a: None}, 10**9, {"odd": 0})} == {0}
    odd = [int(t[1:]) % 2 for t in sampled({a: None, b: None}, 5000, {"odd": 3})]
    assert 800 < len(odd) < 1200 and 0.65 < sum(odd) / len(odd) < 0.85
    with pytest.raises(ValueError, match="a: got 11 shards to read, takes 1 to its 10"):
        sample({a: 11}, 1)
    with pytest.raises(ValueError, match="weights: got 'Odd', takes even, odd"):
        sample({a: 1}, 1, {"Odd": 1})
    with pytest.raises(ValueError, match="leave no text"):
        sample({a: 1}, 1, {"odd": 0, "even": 0})
