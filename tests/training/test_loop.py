"""The step's arithmetic, and the errors of a run."""

import copy
import errno
import math
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from openllama import files, tokenizer
from openllama.config import from_dict, load
from openllama.data.loader import Batch, PackedLoader
from openllama.model import Llama
from openllama.optim import AdamW, decay_groups
from openllama.pretrained import read_model, weights
from openllama.training import checkpoint
from openllama.training.config import TrainConfig
from openllama.training.loop import Trainer
from openllama.training.monitor import read_metrics
from openllama.training.step import batch_loss, train_step

from .conftest import SHAPE, texts


def test_the_loss_falls_and_metrics_are_whole(settings, tmp_path):
    assert Trainer(settings(steps=30, warmup=5)).run() == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 30
    assert losses[0] == pytest.approx(math.log(SHAPE["vocab_size"]), rel=0.1)  # small weights: an even guess
    assert losses[-1] < losses[0] - 1
    expected = {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_second_per_gpu",
        "mfu",
        "memory_gib",
        "epoch",
    }
    assert all(r.keys() == expected for r in records if "loss" in r)
    assert all(r["mfu"] is None for r in records if "loss" in r), "a CPU has no peak: N/A, not another card's"
    assert sum("valid_bits_per_byte" in r for r in records) == 10


def test_micro_batches_with_different_token_counts_equal_one_large_batch(settings):
    """CASES 16: the mean is over tokens, not over micro-batches."""
    trainer = Trainer(settings())
    small = [next(trainer.loader) for _ in range(3)]
    small[1].labels[10:] = -100  # most of this micro-batch is padding
    small[1].targets = int((small[1].labels != -100).sum())
    offsets = [0, *torch.tensor([b.ids.numel() for b in small]).cumsum(0).tolist()]
    large = Batch(
        *(torch.cat([getattr(b, name) for b in small]) for name in ("ids", "labels", "positions")),
        torch.cat(
            [torch.zeros(1, dtype=torch.int32), *(b.cu_seqlens[1:] + o for b, o in zip(small, offsets))]
        ),
        max(b.max_seqlen for b in small),
        sum(b.targets for b in small),
    )
    results = []
    for batches in (small, [large]):
        model = Llama(trainer.model.config).initialise(3)
        targets = sum(b.targets for b in batches)
        result = train_step(model, AdamW(decay_groups(model, 0.1)), batches, targets, 1e-2, 1.0)
        results.append((result, model))
    (a, one), (b, two) = results
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)
    for (name, p), q in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(
            p, q, rtol=0, atol=2e-5, msg=name
        )  # Adam's first step: lr * sign, or nearly


def test_schedule():
    c = TrainConfig("tiny", "s", "t", "o", steps=100, lr=1.0, warmup=10, min_lr_share=0.1, context=64)
    assert c.lr_at(1) == pytest.approx(0.1) and c.lr_at(10) == 1.0
    assert c.lr_at(55) == pytest.approx(0.55) and c.lr_at(100) == pytest.approx(0.1)
    assert all(c.lr_at(s) >= c.lr_at(s + 1) for s in range(10, 100))


def test_norms_do_not_decay(settings):
    model = Llama(settings().model_config())
    decays, rests = decay_groups(model, 0.1)
    assert decays["weight_decay"] == 0.1 and rests["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decays["params"]) and all(p.dim() == 1 for p in rests["params"])
    assert sum(len(g["params"]) for g in (decays, rests)) == len(list(model.parameters()))


def test_original_settings():
    c = load(TrainConfig, "train/configs/7b.yaml")
    assert (c.context, c.batch, c.accumulation, c.lr, c.warmup) == (1024, 2, 12, 2e-4, 2000)
    assert (c.weight_decay, c.clip, c.model_config().vocab_size) == (0.1, 1.0, 100_000)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"context": 4096}, ["context", "4096", "max_positions"]),
        ({"model": {"hiden": 3}}, ["hiden", "'hidden'"]),
        ({"preset": "tini"}, ["tini", "'tiny'"]),
        ({"lr": float("nan")}, ["lr", "nan"]),
        ({"steps": 0}, ["steps", "0"]),
    ],
)
def test_bad_settings_name_themselves(settings, changes, names):
    with pytest.raises(ValueError) as error:
        settings(**changes)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    "preset, changes, heads, kv_heads, head_dim",
    [
        ("7b", {"heads": 64}, 64, 64, 64),
        ("125m", {"heads": 6}, 6, 6, 128),
        ("llama3-8b", {"heads": 16}, 16, 8, 256),  # its 8 key heads are its own
        ("7b", {"hidden": 2048, "head_dim": 128}, 32, 32, 128),
        ("7b", {}, 32, 32, 128),
    ],
)
def test_sizes_that_follow_from_others_follow_the_changed_ones(
    settings, preset, changes, heads, kv_heads, head_dim
):
    shape = settings(preset=preset, model=changes).model_config()
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (heads, kv_heads, head_dim)


def test_a_signal_cuts_validation_short_and_the_resumed_run_makes_up_for_it(settings, tmp_path, monkeypatch):
    config = settings(steps=3, save_every=100)
    trainer, calls = Trainer(config), []

    def loss(*arguments):
        calls.append(1)
        if len(calls) == 2:  # one batch is tried before the first step
            signal.raise_signal(signal.SIGTERM)
        return batch_loss(*arguments)

    monkeypatch.setattr("openllama.training.loop.batch_loss", loss)
    assert trainer.run() == 143 and len(calls) == 2 < trainer.valid_loader.packs / 2
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [3]
    path = tmp_path / "run" / "metrics.jsonl"
    assert not any("valid_loss" in r for r in read_metrics(path))
    for _ in range(2):
        assert Trainer(config).run() == 0
        assert [r["step"] for r in read_metrics(path) if "valid_loss" in r] == [3]


def test_a_vocabulary_that_does_not_fit_the_model(settings):
    with pytest.raises(ValueError, match=r"320 is over the model's vocab_size=\s*100"):
        Trainer(settings(model={**SHAPE, "vocab_size": 100}))


def test_a_checkpoint_of_another_shape_is_refused(settings):
    assert Trainer(settings(steps=2)).run() == 0
    with pytest.raises(ValueError, match="the model's layers is 2, this run's 3"):
        Trainer(settings(model={**SHAPE, "layers": 3}))


def test_a_checkpoint_of_another_dtype_is_refused_and_changes_nothing(settings):
    assert Trainer(settings(steps=2)).run() == 0
    place = checkpoint.step_folder(settings_folder(settings) / "checkpoints", 2)
    model = Llama(settings().model_config()).initialise(5).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"got torch.float32, takes torch.bfloat16"):
        checkpoint.load(place, model, AdamW(model.parameters()))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
)
def test_a_damaged_file_of_a_checkpoint_is_named(settings, name):
    assert Trainer(settings(steps=2)).run() == 0
    path = checkpoint.step_folder(settings_folder(settings) / "checkpoints", 2) / name
    path.write_bytes(path.read_bytes()[:100] if name != "state.json" else b'{"version": 1}')
    with pytest.raises(ValueError, match=rf"{name}: (not a whole safetensors file|no key 'step')"):
        Trainer(settings(steps=4))


def test_a_resumed_run_holds_no_file_of_its_checkpoint(settings):
    """On the CPU a tensor of safetensors is a view of the file, which would keep its room on the disk."""
    assert Trainer(settings(steps=2)).run() == 0
    trainer = Trainer(settings(steps=4))
    assert trainer.step == 2 and "optimizer.safetensors" not in Path("/proc/self/maps").read_text()


def test_missing_shards_are_named(settings, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nope: no manifest\.json; takes a folder that train/prepare_data"
    ):
        Trainer(settings(shards=str(tmp_path / "nope")))


def test_a_disk_that_fills_while_metrics_are_written_is_named(settings):
    trainer = Trainer(settings())
    metrics, step = settings_folder(settings) / "metrics.jsonl", trainer.train_step

    def filling(stopping):
        metrics.unlink(missing_ok=True)
        metrics.symlink_to("/dev/full")
        return step(stopping)

    trainer.train_step = filling
    with pytest.raises(OSError, match=r"metrics\.jsonl: No space left on device; free space, run again"):
        trainer.run()  # which closes the monitor too


def test_a_checkpoint_of_another_tokenizer_is_refused(settings, tmp_path):
    assert Trainer(settings(steps=2)).run() == 0
    other = tmp_path / "other.model"
    tokenizer.train(texts(100, 9), other, SHAPE["vocab_size"] - 10)
    with pytest.raises(ValueError, match=r"tokenizer"):
        Trainer(settings(tokenizer=str(other)))


def test_a_full_disk_keeps_the_older_checkpoint(settings, tmp_path, monkeypatch):
    trainer = Trainer(settings(steps=4, save_every=2))
    real, calls = files._sync, []

    def full(path):
        if "step-00000004" in str(path):
            calls.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(OSError, match="disk is full"):
        trainer.run()
    assert calls
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.steps(folder) == [2] and [p.name for p in folder.iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert Trainer(settings(steps=4)).run() == 0


def test_no_room_is_said_before_anything_is_written(settings, tmp_path, monkeypatch):
    trainer = Trainer(settings(steps=2))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="are free"):
        trainer.run()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


def test_a_diverged_run_keeps_its_good_checkpoints(settings, tmp_path):
    """The loss is logged far more seldom than checkpoints are saved, and yet no bad one is."""
    trainer = Trainer(settings(steps=9, save_every=2, log_every=100, valid_shards=None))
    step = trainer.train_step

    def diverging(stopping):
        if trainer.step == 4:
            with torch.no_grad():
                trainer.model.norm.weight.fill_(float("inf"))
        return step(stopping)

    trainer.train_step = diverging
    with pytest.raises(FloatingPointError, match="step 6: the loss or the gradient's norm is not finite"):
        trainer.run()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2, 4]


def test_accelerates_own_settings_do_not_change_the_arithmetic(settings, tmp_path, monkeypatch):
    assert Trainer(settings(steps=2, out=str(tmp_path / "plain"))).run() == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(True)
    try:
        assert Trainer(settings(steps=2, out=str(tmp_path / "changed"))).run() == 0
    finally:
        AcceleratorState._reset_state(True)
    plain, changed = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("plain", "changed"))
    assert [r["grad_norm"] for r in plain if "loss" in r] == [r["grad_norm"] for r in changed if "loss" in r]


def test_an_unknown_tracker_is_named(settings):
    with pytest.raises(ValueError, match="pip install wandb"):
        Trainer(settings(trackers=["wandb"]))


def test_validation_takes_a_fair_sample(settings):
    """The first batches are not those of the longest documents."""
    loader = Trainer(settings()).valid_loader
    first = next(loader.one_epoch())
    assert not torch.equal(first.ids, next(PackedLoader(loader.sources, 64, 2, shuffle=False)).ids)
    assert torch.equal(first.ids, next(loader.one_epoch()).ids)


def test_two_sources_in_a_mix_train_and_resume(settings, corpus, tmp_path):
    shards = {"web": str(corpus / "train"), "books": str(corpus / "valid")}
    config = settings(shards=shards, mix={"web": 0.5, "books": 3.0}, long="sample", steps=3, save_every=2)
    trainer = Trainer(config)
    assert trainer.run() == 0
    assert sorted(p.name for p in (tmp_path / "run/tokens/train").iterdir()) == ["books", "web"]
    assert trainer.loader.mix == config.mix and trainer.loader.long == "sample"
    assert Trainer(settings(**{**vars(config), "steps": 4})).run() == 0
    with pytest.raises(ValueError, match=r"loader state: mix is .*'books': 3\.0.*, this loader has"):
        Trainer(settings(**{**vars(config), "steps": 5, "mix": {}}))


def test_a_run_starts_from_a_models_weights(settings, tmp_path):
    first = Trainer(settings(out=str(tmp_path / "first"), steps=4))
    assert first.run() == 0
    step = checkpoint.step_folder(tmp_path / "first/checkpoints", 4)
    second = Trainer(settings(start_from=str(tmp_path / "first/checkpoints"), steps=2))
    assert second.step == 0 and second.tokens == 0
    for name, value in weights(read_model(step, None, "cpu")).items():
        assert torch.equal(value, weights(second.model)[name])
    assert second.run() == 0
    assert (
        Trainer(settings(start_from=str(tmp_path / "first/checkpoints"), steps=3)).step == 2
    )  # goes on from its own
    with pytest.raises(ValueError, match=r"step-00000004: the model's hidden is 32, this run's 16"):
        Trainer(settings(out=str(tmp_path / "x"), start_from=str(step), model={**SHAPE, "hidden": 16}))
    tokenizer.train(texts(300, 5), tmp_path / "other.model", 310)
    with pytest.raises(
        ValueError, match=r"made with another tokenizer than .*; set tokenizer=.*tokenizer\.model"
    ):
        Trainer(
            settings(out=str(tmp_path / "y"), start_from=str(step), tokenizer=str(tmp_path / "other.model"))
        )


def test_what_tokenising_does_not_need_is_checked_before_it(settings, tmp_path):
    for change, message in (
        ({"valid_shards": str(tmp_path / "none")}, r"none: no manifest\.json"),
        ({"model": {**SHAPE, "vocab_size": 100}}, "its vocabulary of 320 is over the model's vocab_size=100"),
        ({"start_from": str(tmp_path / "gone")}, "gone: no such folder; takes a checkpoint"),
        ({"mix": {"tset": 2.0}}, "mix: got 'tset', no source or category"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Trainer(settings(**change))
        assert not (tmp_path / "run/tokens").exists()
    for change, message in (
        ({"seed": -1}, "seed: got -1"),
        ({"shards": {"a/b": "x"}}, "shards: got the name 'a/b', takes letters"),
        ({"long": "cut"}, "long: got 'cut'"),
        ({"processes": 0}, "processes: got 0, takes a whole number of at least 1, or null"),
        ({"mix": {"a": "much"}}, "mix.a: got 'much', takes a value of type float"),
    ):
        with pytest.raises(ValueError, match=message):
            from_dict(TrainConfig, {**vars(settings()), **change}, "run.yaml")


def test_two_runs_in_one_folder_are_refused(settings, tmp_path):
    trainer = Trainer(settings())
    with files.sole_writer(tmp_path / "run"), pytest.raises(BlockingIOError, match="another run is writing"):
        trainer.run()
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_that_began_before_another_ended_is_refused(settings, tmp_path):
    """It would train on from weights that are old by then, and cut off the other's records."""
    early = Trainer(settings(steps=4, save_every=2))
    assert Trainer(settings(steps=8, save_every=2)).run() == 0
    with pytest.raises(BlockingIOError, match="another run saved step 8 after this one had begun; run again"):
        early.run()
    assert [r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r] == list(
        range(1, 9)
    )


def settings_folder(settings):
    from pathlib import Path

    return Path(settings().out)


def test_what_backward_makes_again_changes_no_bit_of_a_run(settings, tmp_path):
    kept = []
    for recompute in ("none", "full"):
        assert Trainer(settings(out=str(tmp_path / recompute), recompute=recompute, steps=3)).run() == 0
        records = read_metrics(tmp_path / recompute / "metrics.jsonl")
        kept.append([(r["loss"], r["grad_norm"]) for r in records if "loss" in r])
    assert kept[0] == kept[1] and len(kept[0]) == 3


def test_a_graph_that_can_not_be_is_named(settings):
    with pytest.raises(ValueError, match="cuda_graph: got true with a CPU"):
        Trainer(settings(cuda_graph=True))
