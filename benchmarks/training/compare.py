"""Ours beside HuggingFace's Llama in one process, on batches of real documents: what the quickstart shows.

The peer is the model's export, in which a stable embedding is folded and the head untied, and takes each step right after ours,
so that a slow moment of the machine hits both. benchmarks/tokens_per_second.py is the suite's comparison.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import hf as peer
from benchmarks.training.ours import Ours
from benchmarks.training.runner import EMPTY, TOLERANCE, Row
from benchmarks.training.side import timed_step
from benchmarks.training.work import WARMUP
from openllama import devices, hf
from openllama.data.loader import Batch
from openllama.model import Llama, flops_per_token
from openllama.training.step import squared_mean_length

Timed = list[tuple[float, float]]  # loss and seconds of each step


def compare(model: Llama, steps: Sequence[Sequence[Batch]], rows: int, device: torch.device) -> list[Row]:
    """Times one optimizer step for each entry of `steps` (micro-batches of `rows` packs), ours and the peer's in turn.

    Returns two rows; `loss_gap` is the largest relative difference of the losses. Raises ValueError where they don't
    agree: then it is not the same work.
    """
    tokens, seq = len(steps[0][0].ids), max(b.max_seqlen for b in steps[0])
    sides = {"ours": Ours(model, tokens, seq), "hf:sdpa": _exported(model, rows, device)}
    timed: dict[str, Timed] = {impl: [] for impl in sides}
    for batches in steps:
        for impl, side in sides.items():
            timed[impl].append(timed_step(side, batches, device))
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    losses = [[loss for loss, _ in timed[impl]] for impl in sides]
    gap = max(abs(a - b) / abs(b) for a, b in zip(*losses))
    if not gap <= TOLERANCE[dtype]:
        raise ValueError(
            f"hf:sdpa: its losses differ from ours by {gap:.1e} of themselves: not the same work"
        )
    made = [_row(impl, sides[impl], timed[impl], steps, model, device) for impl in sides]
    for row in made:
        row |= {"dtype": dtype, "ratio": made[0]["rate"] / row["rate"], "loss_gap": gap}
    return made


def _exported(model: Llama, rows: int, device: torch.device) -> peer.HuggingFace:
    with tempfile.TemporaryDirectory() as folder:
        hf.export_hf(model, Path(folder) / "hf")
        exported = peer.from_folder(Path(folder) / "hf", device, model.embed.weight.dtype)
    return peer.HuggingFace(exported, rows, packed=True)


def _row(
    impl: str, side: Any, timed: Timed, steps: Sequence[Sequence[Batch]], model: Llama, device: torch.device
) -> Row:
    batches = [batch for group in steps for batch in group]
    seconds = statistics.median(s for _, s in timed[WARMUP:])
    rate = sum(b.targets for b in batches) / len(timed) / seconds
    flops = rate * flops_per_token(model.config, squared_mean_length(batches))
    peak = devices.peak_flops(device, model.embed.weight.dtype)
    return EMPTY | {
        "bench": "train_step",
        "impl": impl,
        "optimizer": side.optimizer_words,
        "settings": side.settings_words,
        "ms": seconds * 1e3,
        "rate": rate,
        "model_tflops": flops / 1e12,
        "of_ceiling": flops / peak if peak else None,
        "parameters": sum(p.numel() for p in side.model.parameters()),
        "losses": [timed[0][0], timed[-1][0]],
    }
