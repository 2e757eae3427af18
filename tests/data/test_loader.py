import json
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from openllama.data.cache import tokenize
from openllama.data.loader import Batch, PackedLoader
from openllama.files import sole_writer

PAD = 3


def corpus(documents=60, longest=50, seed=0):
    """Documents whose token ids are all different, so that each token can be followed."""
    lengths = np.random.default_rng(seed).integers(2, longest, documents)
    ends = 10 + np.cumsum(lengths)
    return [list(range(end - n, end)) for n, end in zip(lengths, ends)]


def pieces(batch):
    """(inputs, labels, positions) of each piece of a batch."""
    bounds = batch.cu_seqlens.tolist()
    for a, b in pairwise(bounds):
        yield batch.ids[a:b].tolist(), batch.labels[a:b].tolist(), batch.positions[a:b].tolist()


def labels_of(batches):
    return [label for b in batches for label in b.labels.tolist() if label != -100]


def same(a: Batch, b: Batch):
    tensors = ("ids", "labels", "positions", "cu_seqlens")
    return all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors) and (a.max_seqlen, a.targets) == (
        b.max_seqlen,
        b.targets,
    )


def test_a_batch_by_hand(cache_of):
    cache = cache_of([[1, 10, 11, 12, 13, 14, 2], [1, 20, 2]])
    (batch,) = PackedLoader(cache, context=4, batch=3, shuffle=False).one_epoch()
    # Best fit: document 0's first 4 labels; its other 2 with document 1's 2; a pack to fill the batch.
    assert batch.ids.tolist() == [1, 10, 11, 12, 13, 14, 1, 20, PAD, PAD, PAD, PAD]
    assert batch.labels.tolist() == [10, 11, 12, 13, 14, 2, 20, 2, -100, -100, -100, -100]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8, 12]
    assert (batch.max_seqlen, batch.targets) == (4, 8)
    assert batch.ids.dtype == batch.labels.dtype == torch.int64
    assert batch.positions.dtype == batch.cu_seqlens.dtype == torch.int32


def test_padding_closes_a_pack_as_its_own_piece(cache_of):
    (batch,) = PackedLoader(
        cache_of([[1, 10, 2], [1, 20, 21, 22, 2]]), context=5, batch=2, shuffle=False
    ).one_epoch()
    assert list(pieces(batch)) == [
        ([1, 20, 21, 22], [20, 21, 22, 2], [0, 1, 2, 3]),
        ([PAD], [-100], [0]),
        ([1, 10], [10, 2], [0, 1]),
        ([PAD] * 3, [-100] * 3, [0, 1, 2]),
    ]


def test_a_corpus_shorter_than_one_pack(cache_of):
    (batch,) = PackedLoader(cache_of([[1, 10, 2]]), context=50, batch=2, shuffle=False).one_epoch()
    assert batch.ids.tolist() == [1, 10] + [PAD] * 98 and batch.labels.tolist() == [10, 2] + [-100] * 98
    assert batch.cu_seqlens.tolist() == [0, 2, 50, 100] and (batch.max_seqlen, batch.targets) == (50, 2)


@pytest.mark.parametrize("context, batch", [(1, 4), (16, 3), (64, 1), (500, 2)])
def test_every_piece_is_a_run_of_one_document(cache_of, context, batch):
    documents = corpus()
    home = {token: i for i, d in enumerate(documents) for token in d}
    loader = PackedLoader(cache_of(documents), context, batch)
    targets = 0
    for made in islice(loader, loader.batches_per_epoch):
        assert len(made.ids) == batch * context == made.cu_seqlens[-1]
        assert made.max_seqlen == max(len(ids) for ids, _, _ in pieces(made)) <= context
        targets += made.targets
        for ids, labels, positions in pieces(made):
            assert positions == list(range(len(ids)))
            if labels[0] == -100:
                assert {*labels} == {-100} and {*ids} == {PAD}
                continue
            assert labels == [i + 1 for i in ids]  # ids count up: the label is the next token
            assert len({home[token] for token in ids + labels}) == 1
    assert targets == loader.targets_per_epoch == sum(len(d) - 1 for d in documents)


@pytest.mark.parametrize("world_size, batch", [(1, 1), (1, 4), (2, 3), (5, 2), (3, 40)])
def test_ranks_partition_each_epoch(cache_of, world_size, batch):
    documents = corpus()
    cache = cache_of(documents)
    wanted = sorted(token for d in documents for token in d[1:])
    loaders = [PackedLoader(cache, 16, batch, 0, r, world_size) for r in range(world_size)]
    orders = []
    for _ in range(3):
        served = [list(islice(loader, loader.batches_per_epoch)) for loader in loaders]
        assert sorted(labels_of(b for rank in served for b in rank)) == wanted
        orders.append([labels_of(rank) for rank in served])
    assert orders[0] != orders[1] != orders[2]
    whole = PackedLoader(cache, 16, batch * world_size)
    ranks = [PackedLoader(cache, 16, batch, 0, r, world_size) for r in range(world_size)]
    for _ in range(3):
        assert torch.equal(next(whole).ids, torch.cat([next(loader).ids for loader in ranks]))


def test_the_order_depends_on_seed_and_epoch_alone(cache_of):
    cache = cache_of(corpus())
    first, again, other = (PackedLoader(cache, 16, 4, seed=s) for s in (1, 1, 2))
    batches = list(islice(first, 3 * first.batches_per_epoch))
    assert all(map(same, batches, again))
    assert not all(map(same, batches, other))
    assert (
        PackedLoader(cache, 16, 4).order(0)[:8].tolist() == PackedLoader(cache, 16, 2).order(0)[:8].tolist()
    )


def test_the_shuffle_is_pinned(cache_of):
    """Resuming under another numpy must give the same order: a changed stream fails here."""
    loader = PackedLoader(cache_of([[1, i] for i in range(10, 20)]), 1, 1, seed=7)
    assert [b.labels.item() - 10 for b in islice(loader, 20)] == PINNED


PINNED = [4, 5, 9, 8, 1, 7, 6, 0, 2, 3, 8, 6, 9, 5, 0, 7, 3, 4, 1, 2]


@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_anywhere_repeats_and_loses_nothing(cache_of, shuffle):
    cache = cache_of(corpus())
    options = {"context": 16, "batch": 7, "seed": 5, "shuffle": shuffle}
    reference = PackedLoader(cache, **options)
    n = reference.batches_per_epoch
    assert reference.packs % 7, "the last batch must be uneven"
    batches = list(islice(reference, 3 * n))
    running = PackedLoader(cache, **options)
    for stop in range(2 * n + 1):  # in the middle, at the end, and at the start of epochs
        state = json.loads(json.dumps(running.state_dict()))
        resumed = PackedLoader(cache, **options)
        resumed.load_state_dict(state)
        assert all(same(a, b) for a, b in zip(batches[stop : stop + n], resumed, strict=False))
        next(running)


def test_resume_with_another_world_size_and_batch(cache_of):
    documents = corpus()
    cache = cache_of(documents)
    before = [PackedLoader(cache, 16, 3, rank=r, world_size=2) for r in range(2)]
    served = [b for loader in before for b in islice(loader, 4)]
    assert before[0].state_dict() == before[1].state_dict()
    after = [PackedLoader(cache, 16, 2, rank=r, world_size=5) for r in range(5)]
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
        while loader.state_dict()["next_pack"] < loader.packs:
            served.append(next(loader))
    assert sorted(labels_of(served)) == sorted(token for d in documents for token in d[1:])
    assert next(after[0]) and after[0].epoch == 1


def test_a_state_of_something_else_is_refused(cache_of):
    cache = cache_of(corpus())
    state = PackedLoader(cache, 16, 4).state_dict()
    for loader, name in (
        (
            PackedLoader(cache_of(corpus(), "other", fingerprint="g"), 16, 4),
            "fingerprint is 'f', this loader has 'g'",
        ),
        (PackedLoader(cache, 32, 4), "context is 16, this loader has 32"),
        (PackedLoader(cache, 16, 4, seed=1), "seed is 0, this loader has 1"),
        (PackedLoader(cache, 16, 4, shuffle=False), "shuffle is True, this loader has False"),
    ):
        with pytest.raises(ValueError, match=f"loader state: {name}"):
            loader.load_state_dict(state)
        assert (loader.epoch, loader.next_pack) == (0, 0)
    with pytest.raises(ValueError, match="got epoch 0, next_pack 100000"):
        PackedLoader(cache, 16, 4).load_state_dict(state | {"next_pack": 100_000})
    with pytest.raises(ValueError, match="version is None"):
        PackedLoader(cache, 16, 4).load_state_dict({})


def test_one_epoch_is_epoch_0_and_leaves_the_state(cache_of):
    loader = PackedLoader(cache_of(corpus()), 16, 4)
    next(loader)
    state, first = loader.state_dict(), list(loader.one_epoch())
    assert loader.state_dict() == state and len(first) == loader.batches_per_epoch
    assert all(map(same, first, loader.one_epoch()))
    assert all(map(same, first, PackedLoader(loader.sources, 16, 4)))
    ranks = [PackedLoader(loader.sources, 16, 4, rank=r, world_size=2).one_epoch() for r in range(2)]
    assert sorted(labels_of(b for rank in ranks for b in rank)) == sorted(labels_of(first))


def test_padding_share(cache_of):
    loader = PackedLoader(cache_of(corpus()), 40, 1)
    padded = sum(int((b.labels == -100).sum()) for b in loader.one_epoch())
    assert loader.padding_share == pytest.approx(padded / (loader.packs * 40))
    assert 0 < loader.padding_share < 0.1


def test_text_through_shards_cache_and_loader_comes_back(shards_of, small, texts, tmp_path):
    """Long documents lose no token: the labels of each epoch spell the corpus."""
    cache = tokenize(shards_of([*texts[:6], "short"]), small, tmp_path / "tokens", progress=False)
    assert cache.lengths.max() > 10 * 128
    loader = PackedLoader(cache, 128, 4)
    wanted = sorted(token for i in range(len(cache)) for token in cache[i][1:].tolist())
    for _ in range(2):
        assert sorted(labels_of(islice(loader, loader.batches_per_epoch))) == wanted


def test_bad_arguments_are_named(cache_of):
    cache = cache_of(corpus())
    for options, message in (
        ({"context": 0, "batch": 1}, "context: got 0"),
        ({"context": 8, "batch": 0}, "batch: got 0"),
        ({"context": 8, "batch": 1, "world_size": 0}, "world_size: got 0"),
        (
            {"context": 8, "batch": 1, "rank": 2, "world_size": 2},
            "rank: got 2, takes 0 to world_size - 1 = 1",
        ),
        ({"context": 8, "batch": 1, "seed": -1}, "seed: got -1"),
        ({"context": 8, "batch": 1, "seed": 2**32}, "seed: got 4294967296"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedLoader(cache, **options)


# ---------------------------------------------------------------- mixes, long documents, many resumes


def test_resume_at_a_random_record_over_two_epochs_and_two_ranks(cache_of):
    """50 times: what two ranks still serve after any stop is what an uninterrupted run would have."""
    documents = corpus(300, 90)
    cache, draw = cache_of(documents), np.random.default_rng(9)
    options = {"context": 32, "batch": 3, "seed": 2, "world_size": 2}
    whole = [PackedLoader(cache, rank=r, **options) for r in range(2)]
    steps = 2 * whole[0].batches_per_epoch
    served = [[next(loader) for _ in range(steps)] for loader in whole]
    for epoch in range(2):
        half = slice(epoch * steps // 2, (epoch + 1) * steps // 2)
        labels = labels_of(b for rank in served for b in rank[half])
        assert sorted(labels) == sorted(t for d in documents for t in d[1:])
    for stop in draw.integers(0, steps, 50).tolist():
        running = [PackedLoader(cache, rank=r, **options) for r in range(2)]
        for loader in running:
            for _ in range(stop):
                next(loader)
        state = json.loads(json.dumps(running[draw.integers(2)].state_dict()))
        assert len(json.dumps(state)) < 300
        for rank in range(2):
            resumed = PackedLoader(cache, rank=rank, **options)
            resumed.load_state_dict(state)
            for wanted in served[rank][stop:]:
                assert same(next(resumed), wanted)


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


def epochs(loader, count):
    sizes = [-(-len(loader.order(epoch)) // (loader.world_size * loader.batch)) for epoch in range(count)]
    return [labels_of(islice(loader, size)) for size in sizes]


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
