from collections import Counter

import pytest

from openllama.data import sample as module
from openllama.data.sample import sample
from openllama.data.shards import ShardWriter, read_shard, read_shards
from openllama.data.unit import fraction


def sampled(folders, *args):
    return [d["text"] for d in sample(folders, *args, progress=False)]


@pytest.fixture
def read(monkeypatch):
    """The numbers of the shards that are read, in order."""
    numbers = []

    def noting(folder, entry, advance):
        numbers.append(int(entry["name"][5:10]))
        return read_shard(folder, entry, advance)

    monkeypatch.setattr(module, "read_shard", noting)
    return numbers


def corpus(folder, shards, category_of=lambda shard: "x", lines=20):
    """Shards of `lines` documents of 10 bytes."""
    with ShardWriter(folder, {}, lines_per_shard=lines) as writer:
        for i in range(shards * lines):
            writer.write({"text": f"{i:010d}", "meta": {"category": category_of(i // lines)}})
    return folder


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
    with pytest.raises(ValueError, match="max_bytes: got 0, takes a whole number of at least 1"):
        sample({a: 1}, 0)


def test_few_shards_of_a_large_folder_are_read_evenly_spread(tmp_path, read):
    folder = corpus(tmp_path / "a", 600)
    got = sampled({folder: None}, 2000)
    assert len(read) == module.LEAST_SHARDS and read == sorted(read)
    assert max(b - a for a, b in zip([0, *read], [*read, 600])) < 2.7 * 600 / module.LEAST_SHARDS
    assert 150 < len(got) < 250
    read.clear()
    assert 1850 < len(sampled({folder: None}, 20_000)) < 2150
    assert 4 * 20_000 <= len(read) * 200 <= 4 * 20_000 + 200
    read.clear()
    assert len(sampled({folder: None}, 120_000)) == 600 * 20 and len(read) == 600


def test_a_category_of_few_shards_gets_its_share(tmp_path, read):
    """Such as one that lies between the shards which are read anyway."""
    sampled({corpus(tmp_path / "plain", 600): None}, 2000)
    rare = [shard for shard in range(600) if shard not in read][:4]
    folder = corpus(tmp_path / "a", 600, lambda shard: "rare" if shard in rare else "x")
    for weight, least, most in ((0, 0, 0), (1, 0, 6), (50, 40, 60), (200, 80, 80)):
        read.clear()
        documents = sample({folder: None}, 2000, {"rare": weight}, progress=False)
        found = Counter(d["meta"]["category"] for d in documents)
        assert least <= found["rare"] <= most and 150 < found.total() < 250, weight
        assert len(read) == module.LEAST_SHARDS + len({*rare} & {*read})
        assert len({*rare} & {*read}) == {0: 0, 1: 1}.get(weight, 4)


def test_folders_keep_their_proportions(tmp_path):
    """Of both are read as many shards, but one is ten times the other."""
    large, small = corpus(tmp_path / "large", 1000), corpus(tmp_path / "small", 100, lambda shard: "y")
    found = Counter(d["meta"]["category"] for d in sample({large: None, small: None}, 8000, progress=False))
    assert 650 < found["x"] < 800 and 50 < found["y"] < 100


def test_names_of_files_as_categories_do_not_make_it_read_all(tmp_path, read):
    folder = corpus(tmp_path / "a", 400, lambda shard: f"file {shard}")
    assert 150 < len(sampled({folder: None}, 2000)) < 250 and len(read) == module.LEAST_SHARDS
    read.clear()
    found = Counter(
        d["meta"]["category"] for d in sample({folder: None}, 2000, {"file 77": 40}, progress=False)
    )
    assert found["file 77"] in range(10, 21) and len(read) <= module.LEAST_SHARDS + 1


def test_text_is_held_out_in_the_same_pass(tmp_path, read, monkeypatch):
    folder, held_out = corpus(tmp_path / "a", 100, lambda shard: "xy"[shard % 2]), []

    def texts(*args):
        held_out.clear(), read.clear()
        taken = {d["text"] for d in sample({folder: None}, *args, held_out, progress=False)}
        held = {d["text"] for d in held_out}
        assert not taken & held and len(held) == len(held_out) and len(read) == len({*read})
        return taken, held

    taken, held = texts(10**9, None)  # all that is not held out
    assert taken | held == {d["text"] for d in read_shards(folder)} and 60 < len(held) < 140
    taken, held = texts(5000, {"x": 0})
    assert {d["meta"]["category"] for d in held_out} == {"x", "y"}
    assert {int(t) // 20 % 2 for t in taken} == {1} and 400 < len(taken) < 600 and 60 < len(held) < 140
    monkeypatch.setattr(module, "HELD_OUT_BYTES", 300)
    assert 15 < len(texts(5000, None)[1]) < 45
