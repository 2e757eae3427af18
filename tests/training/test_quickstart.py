"""`make quickstart`'s script, whole but small: every stage, its files, and a second run that reuses them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
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


LANGUAGES = {"english", "chinese", "japanese"}


@pytest.fixture
def quickstart(tmp_path, monkeypatch, one_thread, script):
    """Runs it in another folder than the repository's, on Python's source alone unless changes say otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "run"
    paths = {"shards": f"{out}/shards/train", "valid_shards": f"{out}/shards/valid", "out": str(out)}

    def run(*, alone: bool = False, **changes) -> subprocess.CompletedProcess:
        """`alone`: in a process of its own."""
        settings = {**SETTINGS, **paths, "tokenizer": f"{out}/tokenizer.model", **changes}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        arguments = ["--config", "config.yaml", "--max-bytes", "1500000"]
        monkeypatch.chdir(tmp_path)
        if not alone:
            return script("quickstart", *arguments)
        command = [sys.executable, ROOT / "train/quickstart.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=280)

    return run


def test_quickstart_and_its_second_run(quickstart, tmp_path):
    first, out = quickstart(alone=True), tmp_path / "run"
    # So small a model does not beat a bigram's counts of all tokens: that, and nothing else, is reported as wrong.
    unmet = "bits/byte are not below the bigram model's"
    assert first.returncode == 1 and unmet in first.stderr, first.stdout + first.stderr
    assert "stopped by SIGTERM with exit code 143" in first.stdout and "resumed at step" in first.stdout
    for name in (
        "shards/train/manifest.json",
        "tokenizer.model",
        "metrics.jsonl",
        "loss.png",
        "categories.png",
        "hf/model.safetensors",
    ):
        assert (out / name).stat().st_size > 0, name
    summary = json.loads((out / "summary.json").read_text())
    held_out = summary["held_out"]
    assert len(summary["failed"]) == 1 and unmet in summary["failed"][0]
    assert 1 < held_out["bigram_bits_per_byte"] < held_out["bits_per_byte"] < 5
    (alone,) = held_out["categories"].values()
    assert alone["bits_per_byte"] == pytest.approx(held_out["bits_per_byte"], rel=1e-6)
    assert summary["export"]["relative_gap"] < 1e-4 and summary["speed"]["loss_gap"] < 1e-3
    assert len(summary["samples"]) == 3 and summary["speed"]["ratio"] > 0

    second = quickstart()
    for thing in ("shards", "tokenizer.model", "checkpoints"):
        assert f"reusing {out}/{thing}" in second.stdout
    assert json.loads((out / "summary.json").read_text())["held_out"] == held_out

    other = quickstart(lr=1e-3)
    assert (
        other.returncode == 1 and "made with lr=0.02, now 0.001" in other.stderr and str(out) in other.stderr
    )


def test_languages_beside_python(quickstart, tmp_path):
    """Texts in three languages are a second source: figures and samples of each, and one model of all."""
    sources = {
        f"{key}shards": {name: f"{tmp_path}/run/shards/{name}/{split}" for name in ("python", "languages")}
        for key, split in (("", "train"), ("valid_", "valid"))
    }
    small = {"model": {**SETTINGS["model"], "vocab_size": 4096}, "steps": 8, "valid_every": 8}
    done = quickstart(**sources, **small, mix={"chinese": 2, "japanese": 4})
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert len(summary["failed"]) == 1 and "not below the bigram model's" in done.stderr, done.stderr

    categories, held_out = summary["held_out"]["categories"], summary["held_out"]
    assert categories.keys() == {"stdlib", *LANGUAGES}
    for name, figures in categories.items():
        assert figures["documents"] > 0 and figures["loss"] > 0
        assert figures["bytes_per_token"] == pytest.approx(summary["bytes_per_token"][f"category {name}"])
        line = next(
            line for line in done.stdout.splitlines() if line.endswith(f"  {name}") and "%" not in line
        )
        assert line.split()[:3:2] == [f"{figures['documents']}", f"{figures['bits_per_byte']:.3f}"]
    # each of their three-byte characters was seen by the tokenizer, most words too
    assert min(categories[name]["bytes_per_token"] for name in ("chinese", "japanese")) > 3
    rates = [figures["bits_per_byte"] for figures in categories.values()]
    assert min(rates) < held_out["bits_per_byte"] < max(rates)
    assert sum(any(letter > "\u3000" for letter in text[:4]) for text in summary["samples"]) == 2


def test_other_sources_are_refused(quickstart, tmp_path):
    folders = {"pile": f"{tmp_path}/shards/train"}
    done = quickstart(shards=folders, valid_shards=folders)
    assert done.returncode == 1 and "got the name 'pile'" in done.stderr and "config.yaml" in done.stderr
    done = quickstart(shards={"python": "a"}, valid_shards={"languages": "b"})
    assert done.returncode == 1 and "takes the same names in both" in done.stderr
