"""Mixes of sources and categories, long documents, and packs that are kept."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from openllama.data.loader import PackedLoader
from openllama.files import sole_writer

from .batches import corpus, epochs, pieces, same


@pytest.fixture
def mixed(cache_of):
    """Two sources; "a" holds the categories x and y, "b" x alone. Their tokens lie in ranges of their own."""
    a, b = corpus(60, 40, 1), corpus(50, 40, 2)
    a = [[t + 100 for t in d] for d in a]
    b = [[t + 20_000 for t in d] for d in b]
    categories = ["xy"[i % 3 == 0] for i in range(60)]
    sources = {
        "a": cache_of(a, "a", "fa", categories),
        "b": cache_of(b, "b", "fb", ["x"] * 50),
    }
    groups = {"a/x": [d for d, c in zip(a, categories) if c == "x"], "b": b}
    groups["a/y"] = [d for d, c in zip(a, categories) if c == "y"]
    return sources, {name: sorted(t for d in docs for t in d[1:]) for name, docs in groups.items()}


def test_several_sources_are_one_corpus(mixed):
    sources, groups = mixed
    first, second = epochs(PackedLoader(sources, 16, 4), 2)
    assert sorted(first) == sorted(second) == sorted(t for group in groups.values() for t in group)
    assert first != second


def test_weights_say_how_often_an_epoch_takes_a_group(mixed):
    sources, groups = mixed
    loader = PackedLoader(sources, 16, 4, mix={"a/x": 2, "y": 0.5, "b": 0})
    made = epochs(loader, 4)
    of = {name: [sorted(set(labels) & set(groups[name])) for labels in made] for name in groups}
    for labels in made:
        counts = np.bincount(labels, minlength=60_000)
        assert (counts[groups["a/x"]] == 2).all() and not counts[groups["b"]].any()
        assert counts[groups["a/y"]].max() == 1
    for first in (0, 2):  # the two halves of y are all of it, each once
        assert sorted(of["a/y"][first] + of["a/y"][first + 1]) == groups["a/y"]
        assert 0.3 < len(of["a/y"][first]) / len(groups["a/y"]) < 0.7
    assert of["a/y"][0] != of["a/y"][2], "each pass over y is shuffled anew"


def test_a_mix_resumes_anywhere_and_ranks_part_it(mixed):
    sources, _ = mixed
    options = {"context": 16, "batch": 3, "seed": 1, "mix": {"a": 1.5, "b": 0.25}}
    reference = PackedLoader(sources, **options)
    batches = list(islice(reference, 3 * reference.batches_per_epoch))
    for stop in range(0, 2 * reference.batches_per_epoch, 3):
        running = PackedLoader(sources, **options)
        for _ in range(stop):
            next(running)
        resumed = PackedLoader(sources, **options)
        resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
        assert all(same(a, b) for a, b in zip(batches[stop:], resumed, strict=False))
    ranks = [PackedLoader(sources, **options | {"batch": 1}, rank=r, world_size=3) for r in range(3)]
    for wanted in batches[: reference.batches_per_epoch - 1]:
        assert torch.equal(wanted.ids, torch.cat([next(loader).ids for loader in ranks]))


def test_a_mix_is_checked_and_part_of_the_state(mixed):
    sources, _ = mixed
    for mix, message in (
        ({"c": 1}, r"mix: got 'c', no source or category; takes one of a, a/x, a/y, b, b/x, x, y"),
        ({"a": -1}, "mix: got -1 for a, takes a number from 0 to 1000"),
        ({"a": float("nan")}, "mix: got nan for a"),
        ({"a": "2"}, "mix: got '2' for a, takes a number"),
        ({"a": 0, "b": 0}, "an epoch takes none"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedLoader(sources, 16, 4, mix=mix)
    state = PackedLoader(sources, 16, 4).state_dict()
    with pytest.raises(ValueError, match=r"mix is \{\}, this loader has \{'a': 2\}"):
        PackedLoader(sources, 16, 4, mix={"a": 2}).load_state_dict(state)
    with pytest.raises(ValueError, match="long is 'split', this loader has 'sample'"):
        PackedLoader(sources, 16, 4, long="sample").load_state_dict(state)


@pytest.mark.parametrize("weight", [0.29, 0.001, 1 / 3, 0.9999, 1.5])
def test_no_weight_is_too_small(cache_of, weight):
    """Whatever the weight and the number of packs: after n epochs each pack was taken weight * n times, to one."""
    for documents in (1, 3, 100):
        cache = cache_of([list(range(20 * i, 20 * i + 9)) for i in range(documents)], str(documents))
        loader = PackedLoader(cache, 8, 1, mix={"test": weight})
        assert loader.packs == max(1, -(-documents * weight // 1)) == len(loader.order(0))
        epochs = 2000 // documents
        taken = np.bincount(np.concatenate([loader.order(e) for e in range(epochs)]), minlength=documents)
        assert weight * epochs - 1 < taken.min() <= taken.max() < weight * epochs + 1
        batches = [next(loader) for _ in range(5)]
        assert loader.padding_share == 0 and all(batch.targets == 8 for batch in batches)


def test_packs_are_kept_for_all_processes(mixed, tmp_path):
    sources, _ = mixed
    options = {"context": 16, "batch": 4, "mix": {"a/x": 2, "y": 0.5}, "long": "sample"}
    wanted = list(islice(PackedLoader(sources, **options), 100))
    for _ in range(2):
        kept = PackedLoader(sources, **options, keep=tmp_path / "packs")
        assert all(map(same, wanted, kept))
        made = (tmp_path / "packs/packs.json").stat().st_mtime_ns
    assert kept._packs.source.base is not None, "read by memory map"
    assert all(map(same, wanted, PackedLoader(sources, **options, keep=tmp_path / "packs")))
    assert (tmp_path / "packs/packs.json").stat().st_mtime_ns == made, "packed once"
    other = options | {"context": 20}  # replaced
    assert all(
        map(
            same,
            islice(PackedLoader(sources, **other), 100),
            PackedLoader(sources, **other, keep=tmp_path / "packs"),
        )
    )
    assert sorted(p.name for p in tmp_path.iterdir() if "pack" in p.name) == ["packs"]


def test_packs_of_sources_with_other_names_are_made_anew(mixed, tmp_path):
    """The mix goes by names: the same files under others are another order."""
    sources, _ = mixed
    swapped = {"a": sources["b"], "b": sources["a"]}
    options = {"context": 16, "batch": 4, "mix": {"b": 3}, "keep": tmp_path / "packs"}
    first, second = PackedLoader(sources, **options), PackedLoader(swapped, **options)
    assert first.packs != second.packs == PackedLoader(swapped, 16, 4, mix={"b": 3}).packs
    with pytest.raises(ValueError, match="fingerprint is 'a=fa b=fb', this loader has 'a=fb b=fa'"):
        second.load_state_dict(first.state_dict())


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 16 * 8])


@pytest.mark.parametrize(
    "damage",
    [
        lambda keep: cut(keep / "source.bin"),
        lambda keep: cut(keep / "first.bin"),
        lambda keep: (keep / "length.bin").write_bytes(b""),
        lambda keep: (keep / "slack.bin").unlink(),
        lambda keep: (keep / "packs.json").unlink(),
        lambda keep: cut(keep / "packs.json"),
        lambda keep: (keep / "packs.json").write_text('{"version": 1, "made_from": {}}'),
        lambda keep: (keep / "packs.json").write_text(
            (keep / "packs.json").read_text().replace('"1"', '"one"')
        ),
    ],
)
def test_damaged_packs_are_made_again(cache_of, tmp_path, damage):
    cache, keep = cache_of(corpus()), tmp_path / "packs"
    options = {"context": 16, "batch": 4, "long": "sample", "keep": keep}
    wanted = list(islice(PackedLoader(cache, **options), 50))
    damage(keep)
    assert all(map(same, wanted, PackedLoader(cache, **options)))
    assert all(map(same, wanted, PackedLoader(cache, **options)))


def test_packs_are_made_by_one_run_at_a_time(cache_of, tmp_path):
    cache, keep = cache_of(corpus()), tmp_path / "tokens/packs"
    PackedLoader(cache, 16, 4, keep=keep)
    with sole_writer(keep.parent):
        assert PackedLoader(cache, 16, 4, keep=keep).packs, "what is there is opened"
        with pytest.raises(BlockingIOError, match="tokens: another run is writing here"):
            PackedLoader(cache, 20, 4, keep=keep)
    (keep / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="packs: is there already and holds something else"):
        PackedLoader(cache, 20, 4, keep=keep)


def test_two_takes_of_a_long_document_in_one_epoch_differ(cache_of):
    loader = PackedLoader(cache_of([list(range(10, 5010))]), 20, 1, long="sample", mix={"test": 8})
    (labels,) = epochs(loader, 1)
    assert len(labels) == 160 and len({*labels}) > 120


def test_sources_of_two_tokenizers_are_refused(cache_of):
    other = cache_of(corpus(), "other")
    other.pad_id = 0
    with pytest.raises(
        ValueError,
        match="sources: other has 65536 pieces, pad id 0 and uint16 ids, the first has 65536, 3 and uint16; tokenise",
    ):
        PackedLoader({"cache": cache_of(corpus()), "other": other}, 16, 4)


def test_long_documents_are_sampled_elsewhere_each_epoch(cache_of):
    documents = [list(range(10, 510)), [1, 2, 3]]
    cache = cache_of(documents)
    sampled = PackedLoader(cache, 20, 1, long="sample")
    starts = {min(set(labels) - {2, 3}) for labels in epochs(sampled, 30)}
    assert len(starts) > 20 and sampled.targets_per_epoch == 22
    again = PackedLoader(cache, 20, 1, long="sample")
    again.load_state_dict(sampled.state_dict())
    assert same(next(again), next(sampled))
    (cut,) = epochs(PackedLoader(cache, 20, 1, long="truncate"), 1)
    assert sorted(cut) == [2, 3, *range(11, 31)]


def test_pieces_say_what_a_pack_is_made_of(mixed):
    sources, _ = mixed
    loader = PackedLoader(sources, 16, 1)
    sampled = PackedLoader(sources, 16, 1, long="sample", mix={"a": 3})
    draws = [
        (loader, draw, batch)
        for loader in (loader, sampled)
        for draw, batch in zip(loader.draws(0), loader.one_epoch())
    ]
    for loader, draw, batch in draws:
        made = [ids for ids, labels, _ in pieces(batch) if labels[0] != -100]
        for piece, ids in zip(loader.pieces(draw), made, strict=True):
            document = sources[piece.source][piece.document]
            assert document[piece.start : piece.start + piece.length].tolist() == ids
