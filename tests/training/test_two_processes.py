"""Two processes (gloo) do what one does, save together and stop together."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from openllama.training import checkpoint
from openllama.training.config import TrainConfig
from openllama.training.faults import is_launcher
from openllama.training.loop import Trainer
from openllama.training.monitor import read_metrics

from .conftest import WORDS, write_shards
from .test_resume import wait_for

ROOT = Path(__file__).resolve().parents[2]


def start(config: TrainConfig) -> subprocess.Popen:
    """Two processes."""
    return launch(config, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(config: TrainConfig, *launcher: str) -> subprocess.Popen:
    path = Path(config.out).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(vars(config)))
    command = [sys.executable, *launcher, str(ROOT / "train" / "pretrain.py"), "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    return out


def in_one(config: TrainConfig) -> None:
    """This one, as another takes seconds to start."""
    assert Trainer(config).run() == 0


def losses(config: TrainConfig) -> list[tuple[float, float]]:
    records = read_metrics(Path(config.out) / "metrics.jsonl")
    return [(r["loss"], r["grad_norm"]) for r in records if "loss" in r]


def test_two_processes_equal_one_with_twice_the_batch_and_one_goes_on(settings, tmp_path, capfd):
    finish(start(settings(out=str(tmp_path / "parted"), batch=2, steps=4, warmup=4)))
    parted = settings(out=str(tmp_path / "parted"), batch=4, steps=8, warmup=4)
    in_one(parted)
    assert "resumed at step 4" in capfd.readouterr().out
    whole = settings(out=str(tmp_path / "whole"), batch=4, steps=8, warmup=4)
    in_one(whole)
    assert len(losses(whole)) == len(losses(parted)) == 8
    first = zip(
        losses(whole)[:4], losses(parted)[:4]
    )  # the cosine of the first four steps was a shorter run's
    for (a, norm_a), (b, norm_b) in first:
        assert a == pytest.approx(b, rel=1e-5) and norm_a == pytest.approx(norm_b, rel=1e-4)
    states = [
        json.loads((checkpoint.step_folder(tmp_path / run / "checkpoints", 8) / "state.json").read_text())
        for run in ("parted", "whole")
    ]
    assert states[0]["tokens"] == states[1]["tokens"] and states[0]["loader"] == states[1]["loader"]


def test_uneven_ends_and_a_validation_smaller_than_the_ranks(settings, tmp_path):
    """Ranks get different token counts, epochs end in the middle of a batch, one pack is held out."""
    draw = random.Random(3)
    documents = [" ".join(draw.choices(WORDS, k=draw.choice([3, 9, 200]))) for _ in range(62)]
    write_shards(tmp_path / "shards", documents)
    write_shards(tmp_path / "held", ["def value in self"])
    shared = {"shards": str(tmp_path / "shards"), "valid_shards": str(tmp_path / "held"), "steps": 14}
    two = settings(out=str(tmp_path / "two"), batch=3, accumulation=3, warmup=4, **shared)
    one = settings(out=str(tmp_path / "one"), batch=6, accumulation=3, warmup=4, **shared)
    said = finish(start(two))
    in_one(one)
    records = [read_metrics(Path(c.out) / "metrics.jsonl") for c in (one, two)]
    assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]]  # one process's records, once
    assert (
        said.count("step     14/14") == 1 and said.count("tokenised") == 2
    )  # rank 0's: training and held out
    trained = [[r for r in run if "loss" in r] for run in records]
    assert len(trained[0]) == 14 and trained[0][-1]["epoch"] >= 2
    for a, b in zip(*trained):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["lr"] == b["lr"] == one.lr_at(a["step"])  # the schedule steps once an optimizer step
        assert a["tokens"] == b["tokens"] and a["epoch"] == b["epoch"]
    held_out = [[r["valid_loss"] for r in run if "valid_loss" in r] for run in records]
    assert len(held_out[0]) == 5 and held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    loader = Trainer(one).loader
    assert loader.packs % 6 and loader.packs < 14 * 18 / 2, "the end of an epoch must be uneven"


@pytest.mark.parametrize(
    "command, is_one",
    [
        (["python", "/venv/bin/accelerate", "launch", "train/pretrain.py"], True),
        (["python", "-m", "accelerate.commands.launch", "train/pretrain.py"], True),
        (["python", "/venv/bin/torchrun", "--nproc-per-node", "2", "train/pretrain.py"], True),
        (["python", "-m", "torch.distributed.run", "train/pretrain.py"], True),
        (["bash", "accelerate_job.sh"], False),
        (["bash", "-c", "accelerate launch train/pretrain.py; python train/pretrain.py"], False),
    ],
)
def test_a_shell_that_names_a_launcher_is_none(command, is_one):
    """`nohup python train/pretrain.py &` in accelerate_job.sh outlives its shell."""
    assert is_launcher(command) == is_one


def test_sigterm_to_accelerate_launch_saves_and_leaves_no_process(settings, tmp_path):
    """The launcher ends at once, without a word to its child, which still saves."""
    config = settings(steps=5000, save_every=100_000, valid_shards=None)
    process = launch(config, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    wait_for(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 3, process)
    process.terminate()
    out, _ = process.communicate(timeout=60)  # the child holds the pipe: its end is the output's
    assert "stopped by a signal; saved at step" in out
    assert len(checkpoint.steps(tmp_path / "run" / "checkpoints")) == 1


def test_the_processes_of_a_launcher_that_is_killed_save_and_leave(settings, tmp_path):
    """They would go on holding their GPUs, or wait for one another."""
    config = settings(steps=5000, save_every=100_000, valid_shards=None)
    process = start(config)
    wait_for(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 3, process)
    process.kill()
    out, _ = process.communicate(timeout=60)  # the workers hold the pipe: their end is the output's
    assert "stopped by a signal; saved at step" in out
    assert len(checkpoint.steps(tmp_path / "run" / "checkpoints")) == 1


def test_sigterm_to_one_process_stops_and_saves_all(settings, tmp_path):
    process = start(settings(steps=5000, save_every=100_000, valid_shards=None))
    wait_for(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [c for c in children if "pretrain.py" in Path(f"/proc/{c}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "stopped by a signal; saved at step" in out
    assert process.returncode != 0 and "exitcode" in out and "143" in out, out
    assert len(checkpoint.steps(tmp_path / "run" / "checkpoints")) == 1
