"""Runs sides one after the other, each in a process of its own, so that each has the card for itself: its memory, its
compiled code, its patched classes. This process never touches the card while one runs.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.training import parts
from benchmarks.training.sides import Side
from benchmarks.training.work import Work
from openllama.files import read_json
from openllama.model import flops_per_token

Row = dict[str, Any]

SIDE = (sys.executable, "-m", "benchmarks.training.side")
LIMIT = 1800  # seconds that a side may take: one that hangs must not keep the others from their turn
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of the first loss, relative to the reference's
EMPTY: Row = {
    "optimizer": "", "settings": "", "dtype": None, "ms": None, "rate": None, "unit": "tokens/s", "model_tflops": None,
    "of_ceiling": None, "peak_gib": None, "parameters": None, "ratio": None, "losses": None, "parts": None,
    "error": None,
}  # fmt: skip


def run(
    sides: Sequence[Side], work: Work, bench: str = "train_step", command: Sequence[str] = SIDE
) -> Iterator[list[Row]]:
    """After each side the rows so far, so that a run which is cut short keeps what it has. One that failed has only its
    `error`. The first side is what others are held to: their first loss must be its own, and `ratio` is its rate over
    theirs."""
    rows: list[Row] = []
    for number, side in enumerate(sides, 1):
        print(f"[{number}/{len(sides)}] {side.impl}", flush=True)
        answer = ask(side, work, command)
        row = {"bench": bench, "shape": answer.pop("shape", work.shape), "impl": side.impl, **EMPTY, **answer}
        row.pop("device", None)
        rows.append(row)
        print(f"    {summary(row)}", flush=True)
        hold_to(rows[0], rows)
        yield rows


def ask(side: Side, work: Work, command: Sequence[str] = SIDE) -> Row:
    """What the side's process measured, or its error: also where it died without a word, or hangs."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "side.json"
        words = ["--side", json.dumps(side._asdict()), "--work", json.dumps(dataclasses.asdict(work))]
        try:
            code = subprocess.run(
                [*command, *words, "--out", str(out)], cwd=results.ROOT, timeout=LIMIT
            ).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"TimeoutError: not done after {LIMIT:,} s"}
        if out.is_file():
            return read_json(out)
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return {"error": f"ChildProcessError: {how}"}


def hold_to(reference: Row, rows: Sequence[Row]) -> None:
    """Fills in `ratio`, and makes an error of a row whose first loss is not the reference's."""
    if reference["error"]:
        return
    for row in rows:
        if row["error"]:
            continue
        gap = abs(row["losses"][0] / reference["losses"][0] - 1)
        if gap <= TOLERANCE[row["dtype"]]:
            row["ratio"] = reference["rate"] / row["rate"]
            continue
        ours, theirs = reference["losses"][0], row["losses"][0]
        row |= EMPTY | {
            "error": f"not the same work: first loss {theirs:.4f}, {reference['impl']}'s {ours:.4f}"
        }


def summary(row: Row) -> str:
    if row["error"]:
        return row["error"]
    return f"{row['rate']:,.0f} tokens/s, {row['ms']:.1f} ms, {row['peak_gib']:.1f} GiB, loss {row['losses'][0]:.4f}"


def table(rows: Sequence[Row]) -> str:
    """The rows as text; `ours is` is how many times as fast."""
    width = max(len(row["impl"]) for row in rows)
    lines = [
        f"{'':{width}} {'tokens/s':>9} {'ms/step':>9} {'TFLOP/s':>8} {'MFU':>6} {'GiB':>6} {'ours is':>8}"
    ]
    for r in rows:
        if r["error"]:
            lines.append(f"{r['impl']:{width}} {r['error']}")
            continue
        mfu = f"{r['of_ceiling']:.1%}" if r["of_ceiling"] else "N/A"
        ratio = f"{r['ratio']:.2f}x" if r["ratio"] else ""
        gib = f"{r['peak_gib']:.1f}" if r["peak_gib"] else ""  # of a process that two sides share, neither's
        lines.append(
            f"{r['impl']:{width}} {r['rate']:>9,.0f} {r['ms']:>9.1f} {r['model_tflops']:>8.2f} {mfu:>6} "
            f"{gib:>6} {ratio:>8}  {r['optimizer']}"
        )
        if r["parts"]:
            lines.append(f"{'':{width}} ms: {parts.text(r['parts'])}")
    return "\n".join(lines)


def formula(work: Work, rows: Sequence[Row]) -> str:
    """How MFU is counted, with this run's numbers, and what peers leave out."""
    config = work.config
    flops = flops_per_token(config, work.seq)
    peak = next((r["model_tflops"] / r["of_ceiling"] for r in rows if r["of_ceiling"]), None)
    lines = [
        "MFU = tokens/s x FLOPs a token / the card's dense peak at this dtype "
        f"({f'{peak:,.0f} TFLOP/s' if peak else 'not known here: N/A'}); FLOPs a token = "
        f"6 x parameters that multiply + 6 x layers x heads x head_dim x seq = {flops / 1e9:.3f} GFLOP"
    ]
    if config.stable_embedding and len(rows) > 1:
        lines.append(
            f"HuggingFace's Llama has no stable embedding: it lacks that LayerNorm, {2 * config.hidden:,} parameters"
        )
    return "\n".join(lines)


def store(name: str, rows: list[Row]) -> Path:
    """Only here, while no side runs, is the card asked for its name."""
    return results.write(name, rows, torch.device("cuda" if on_gpu() else "cpu"))


def on_gpu() -> bool:
    """Whether sides run on one. Asking takes none of the card's memory."""
    return torch.cuda.is_available()
