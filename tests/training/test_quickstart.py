"""`make quickstart`'s script, whole but small: every stage, its files, and a second run that reuses them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = {
    "preset": "tiny",
    "model": {"vocab_size": 512, "hidden": 64, "intermediate": 128, "layers": 2, "heads": 1, "kv_heads": 1},
    "dtype": "float32",
    "context": 128,
    "batch": 8,
    "accumulation": 1,
    "steps": 120,
    "lr": 2e-2,
    "warmup": 10,
    "log_every": 5,
    "valid_every": 60,
    "save_every": 1000,
}


def quickstart(tmp_path: Path, **changes) -> subprocess.CompletedProcess:
    out = tmp_path / "run"
    paths = {"shards": f"{out}/shards/train", "valid_shards": f"{out}/shards/valid", "out": str(out)}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, **paths, "tokenizer": f"{out}/tokenizer.model", **changes}))
    command = [sys.executable, "-m", "train.quickstart", "--config", str(config), "--max-bytes", "1500000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_quickstart_and_its_second_run(tmp_path):
    first, out = quickstart(tmp_path), tmp_path / "run"
    # So small a model does not beat a bigram's counts of all tokens: that, and nothing else, is reported as wrong.
    unmet = "bits/byte are not below the bigram model's"
    assert first.returncode == 1 and unmet in first.stderr, first.stdout + first.stderr
    assert "stopped by SIGTERM with exit code 143" in first.stdout and "resumed at step" in first.stdout
    for name in (
        "shards/train/manifest.json",
        "tokenizer.model",
        "metrics.jsonl",
        "loss.png",
        "hf/model.safetensors",
    ):
        assert (out / name).stat().st_size > 0, name
    summary = json.loads((out / "summary.json").read_text())
    held_out = summary["held_out"]
    assert len(summary["failed"]) == 1 and unmet in summary["failed"][0]
    assert 1 < held_out["bigram_bits_per_byte"] < held_out["bits_per_byte"] < 5
    assert summary["export"]["relative_gap"] < 1e-4 and summary["speed"]["loss_gap"] < 1e-3
    assert len(summary["samples"]) == 3 and summary["speed"]["ratio"] > 0

    second = quickstart(tmp_path)
    for thing in ("shards", "tokenizer.model", "checkpoints"):
        assert f"reusing {out}/{thing}" in second.stdout
    assert json.loads((out / "summary.json").read_text())["held_out"] == held_out

    other = quickstart(tmp_path, lr=1e-3)
    assert (
        other.returncode == 1 and "made with lr=0.02, now 0.001" in other.stderr and str(out) in other.stderr
    )
