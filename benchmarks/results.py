"""One schema for every stored figure: benchmarks/results/NAME-DEVICE.json, rewritten by a run of its command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from openllama import devices
from openllama.files import write_json

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "quack-kernels",
    "torchao",
    "xformers",
    "flash-attn",
    "accelerate",
)


def write(name: str, rows: list[dict[str, Any]], device: torch.device, folder: Path = FOLDER) -> Path:
    """Stores rows of {"bench", "shape", "impl", "ms", "rate", "unit", ...} with where they come from."""
    folder.mkdir(parents=True, exist_ok=True)
    called = "cpu" if device.type == "cpu" else re.sub(r"\W+", "-", devices.name(device).lower())
    path = folder / f"{name}-{called}.json"
    record = {
        "command": " ".join([Path(sys.executable).name, *_readable(sys.orig_argv[1:])]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "device": f"{cpu_name()}, {torch.get_num_threads()} threads"
        if device.type == "cpu"
        else devices.name(device),
        "versions": {"python": sys.version.split()[0], **_versions()},
        "rows": rows,
    }
    write_json(path, record, indent=1)
    return path


def commit() -> str:
    """The commit of the working tree, `-dirty` where sources differ; outside a clone what OPENLLAMA_COMMIT says."""

    def git(*words: str) -> str:
        return subprocess.check_output(
            ["git", *words], cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        made_by_runs = [":!benchmarks/results", ":!README.md", ":!docs"]
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", *made_by_runs)
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("OPENLLAMA_COMMIT") or "unknown"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _readable(words: list[str]) -> list[str]:
    """Paths inside the clone relative to it: a stored command says nothing of the machine."""
    return [word.replace(f"{ROOT}/", "") for word in words]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
