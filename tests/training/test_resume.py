"""Interrupted and resumed equals uninterrupted, bit for bit; a kill during a save loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from openllama.training import checkpoint
from openllama.training.checkpoint import step_folder
from openllama.training.loop import Trainer
from openllama.training.monitor import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("tokens_per_second_per_gpu", "memory_gib")


def stable(folder: Path) -> list[dict]:
    """Metrics without what a clock decides."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def equal(a: Path, b: Path) -> None:
    """Two checkpoints hold the same bits."""
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        one, two = load_file(a / name), load_file(b / name)
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), f"{name}: {key}"
    states = [json.loads((p / "state.json").read_text()) for p in (a, b)]
    assert states[0]["loader"] == states[1]["loader"] and states[0]["tokens"] == states[1]["tokens"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("signal_at, stop", [(1, 2), (3, 3), (4, 5)])  # step 3's validation is cut short
def test_resumed_equals_uninterrupted(settings, tmp_path, dtype, signal_at, stop):
    whole = settings(out=str(tmp_path / "whole"), dtype=dtype)
    assert Trainer(whole).run() == 0
    parted = settings(out=str(tmp_path / "parted"), dtype=dtype, save_every=stop)
    first = Trainer(parted)
    step = first.train_step

    def signalled(stopping):
        result = step(stopping)
        if first.step == signal_at:  # in the middle of a step, as it were: the one after is the last
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # schedulers send it twice
        return result

    first.train_step = signalled
    assert first.run() == 143
    assert checkpoint.steps(tmp_path / "parted" / "checkpoints")[-1] == stop
    torch.manual_seed(999)  # whatever happened in between must not matter
    second = Trainer(parted)
    assert second.step == stop
    assert second.run() == 0
    assert stable(tmp_path / "whole") == stable(tmp_path / "parted")
    equal(*(step_folder(tmp_path / run / "checkpoints", 6) for run in ("whole", "parted")))


@pytest.mark.parametrize("place", ["in the middle of the second epoch", "at the end of the first epoch"])
def test_resume_over_epochs(settings, tmp_path, place):
    """CASES 17: no record repeated, none lost, the learning rate right."""
    changes = {"steps": 40, "batch": 8, "accumulation": 1, "save_every": 1000, "valid_shards": None}
    whole = Trainer(settings(out=str(tmp_path / "whole"), **changes))
    assert whole.run() == 0
    assert whole.loader.epoch == 1
    parted = settings(out=str(tmp_path / "parted"), **changes)
    first = Trainer(parted)
    epoch = first.loader.batches_per_epoch
    while first.step < (epoch if place.startswith("at") else epoch + (40 - epoch) // 2):
        first.train_step()
    first._save()
    assert Trainer(parted).run() == 0
    equal(*(step_folder(tmp_path / run / "checkpoints", 40) for run in ("whole", "parted")))


def start(config, tmp_path, *overrides: str) -> subprocess.Popen:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(vars(config)))
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--config", str(path), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "the run did not come so far"
        time.sleep(0.01)


def test_sigterm_saves_and_exits_143_then_goes_on(settings, tmp_path):
    config = settings(steps=3000, save_every=100_000, valid_every=100_000, log_every=1)
    process = start(config, tmp_path)
    wait_for(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > 5, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143, out
    assert "saved at step" in out
    (saved,) = checkpoint.steps(tmp_path / "run" / "checkpoints")
    process = start(config, tmp_path, f"steps={saved + 2}")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert f"resumed at step {saved}" in out
    steps = [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, saved + 3))


def test_kill_during_a_save_leaves_the_older_checkpoint(settings, tmp_path):
    """A save that never ends (its rename blocks) is killed with SIGKILL; the run then resumes from the one before."""
    config = settings(steps=50, save_every=2)
    script = tmp_path / "slow.py"
    script.write_text(
        "import os, sys, time, yaml\n"
        "from openllama import files\n"
        "from openllama.training.config import TrainConfig\n"
        "from openllama.training.loop import Trainer\n"
        "move = files._move_into_place\n"
        "def slow(aside, folder):\n"
        "    if folder.name == 'step-00000004':\n"
        "        print('SAVING', flush=True); time.sleep(60)\n"
        "    move(aside, folder)\n"
        "files._move_into_place = slow\n"
        "Trainer(TrainConfig(**yaml.safe_load(open(sys.argv[1])))).run()\n"
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(vars(config)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "config.yaml")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert any(line.startswith("SAVING") for line in process.stdout)
    process.kill()
    process.wait()
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.steps(folder) == [2]
    assert list(folder.glob(".step-00000004*")), "the test must kill it in the middle of a save"
    trainer = Trainer(settings(steps=6))
    assert trainer.step == 2
    assert trainer.run() == 0
    assert checkpoint.steps(folder) == [4, 6]
    assert not list(folder.glob(".step-*")), "leftovers of the killed save are cleared away"
