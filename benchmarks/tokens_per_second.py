"""Training speed of ours and of its peers: `python -m benchmarks.tokens_per_second --preset 125m --batch 8 --seq 1024`.

Ours is the very step that pre-training runs. Each peer gets the same weights and the same batches, and takes its step
right after ours, so that a slow moment of the machine hits both; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.peers.hf import HuggingFace
from openllama import cli, devices, hf
from openllama.data.loader import Batch
from openllama.model import Llama, flops_per_token
from openllama.optim import AdamW, decay_groups
from openllama.presets import PRESETS, preset
from openllama.training.step import accumulate_in_fp32, squared_mean_length, train_step

LR, CLIP = 1e-4, 1.0
WARMUP = 3  # steps that don't count: allocations, algorithm choices

Step = Callable[[Sequence[Batch]], torch.Tensor]


class Ours:
    """The project's own step."""

    name = "ours"
    optimizer_form = "fp32 moments; fp32 masters of bf16 weights"

    def __init__(self, model: Llama):
        self.model = model
        self.optimizer = AdamW(decay_groups(model, 0.1), lr=LR)
        accumulate_in_fp32(model)

    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        return train_step(self.model, self.optimizer, batches, sum(b.targets for b in batches), LR, CLIP).loss


def synthetic_batches(vocab: int, batch: int, seq: int, count: int, seed: int = 0) -> list[Batch]:
    """Batches of `batch` documents of random tokens, each `seq` long."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (count, batch * seq + 1), generator=generator)
    positions = torch.arange(seq, dtype=torch.int32).repeat(batch)
    cu_seqlens = torch.arange(0, batch * seq + 1, seq, dtype=torch.int32)
    return [Batch(row[:-1].clone(), row[1:].clone(), positions, cu_seqlens, seq, batch * seq) for row in ids]


def compare(
    model: Llama, steps: Sequence[Sequence[Batch]], rows: int, peers: Sequence[str], device: torch.device
) -> list[dict[str, Any]]:
    """Times one optimizer step for each entry of `steps` (micro-batches of `rows` packs), ours and the peers' in turn.

    Returns rows of benchmarks/results.py's schema; `ratio` is ours over the peer, `loss_gap` the largest relative
    difference of the losses. Raises ValueError where they don't agree: then it is not the same work.
    """
    sides: list[Any] = [Ours(model)]
    if "hf" in peers:
        with tempfile.TemporaryDirectory() as folder:
            hf.export_hf(model, Path(folder) / "hf")
            dtype = model.embed.weight.dtype
            sides.append(HuggingFace(Path(folder) / "hf", rows, device, dtype, LR, CLIP))
    timed: list[list[tuple[float, float]]] = [[] for _ in sides]  # (loss, seconds) of each step
    for batches in steps:
        for side, results_of_side in zip(sides, timed):
            results_of_side.append(_timed(side.step, batches, device))
    batches = [b for group in steps for b in group]
    for side, of_side in zip(sides, timed):
        gap = _loss_gap(timed[0], of_side)
        if not gap <= (1e-3 if model.embed.weight.dtype == torch.float32 else 3e-2):
            raise ValueError(
                f"{side.name}: its losses differ from ours by {gap:.1e} of themselves: not the same work"
            )
    return [_row(side, of_side, timed[0], batches, model, device) for side, of_side in zip(sides, timed)]


def _timed(step: Step, batches: Sequence[Batch], device: torch.device) -> tuple[float, float]:
    _wait(device)
    start = time.perf_counter()
    loss = step(batches)
    _wait(device)
    return float(loss), time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median(timed: Sequence[tuple[float, float]]) -> float:
    return statistics.median(seconds for _, seconds in timed[WARMUP:])


def _loss_gap(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> float:
    return max(abs(a - b) / abs(b) for (a, _), (b, _) in zip(ours, theirs))


def _row(
    side: Any, timed, ours, batches: Sequence[Batch], model: Llama, device: torch.device
) -> dict[str, Any]:
    dtype, seq = model.embed.weight.dtype, squared_mean_length(batches)
    rate = sum(b.targets for b in batches) / len(timed) / _median(timed)
    flops, peak = rate * flops_per_token(model.config, seq), devices.peak_flops(device, dtype)
    return {
        "bench": "train_step",
        "shape": {"tokens": batches[0].ids.numel(), "seq": seq},
        "impl": side.name,
        "optimizer": side.optimizer_form,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": _median(timed) * 1e3,
        "rate": rate,
        "unit": "tokens/s",
        "model_tflops": flops / 1e12,
        "of_ceiling": flops / peak if peak else None,
        "ratio": _median(timed) / _median(ours),
        "loss_gap": _loss_gap(ours, timed),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text: tokens/s, step time, model TFLOP/s, MFU, and how much faster ours is."""
    lines = [f"{'':<10} {'tokens/s':>10} {'ms/step':>9} {'TFLOP/s':>8} {'MFU':>6} {'ours is':>8}"]
    for r in rows:
        mfu = f"{r['of_ceiling']:.1%}" if r["of_ceiling"] else "N/A"
        lines.append(
            f"{r['impl']:<10} {r['rate']:>10,.0f} {r['ms']:>9.1f} {r['model_tflops']:>8.2f} {mfu:>6} {r['ratio']:>7.2f}x"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="125m", choices=list(PRESETS))
    parser.add_argument(
        "--batch", type=int, default=8, help="documents in a micro-batch; lower it when memory runs out"
    )
    parser.add_argument("--seq", type=int, default=1024, help="tokens in a document")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in an optimizer step")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps that are timed")
    parser.add_argument("--peers", nargs="*", default=["hf"], choices=["hf"])
    args = parser.parse_args()
    for name in ("batch", "seq", "accumulation", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: got {getattr(args, name)}, takes a whole number of at least 1")
    if args.seq > (longest := preset(args.preset).max_positions):
        raise ValueError(
            f"--seq: got {args.seq}, takes at most {longest}, the max_positions of {args.preset}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Llama(preset(args.preset)).initialise().to(device, dtype)
    count = (args.steps + WARMUP) * args.accumulation
    batches = synthetic_batches(model.config.vocab_size, args.batch, args.seq, count)
    steps = [batches[i : i + args.accumulation] for i in range(0, count, args.accumulation)]
    rows = compare(model, steps, args.batch, args.peers, device)
    for row in rows:
        row["shape"] = {
            "preset": args.preset,
            "batch": args.batch,
            "seq": args.seq,
            "accumulation": args.accumulation,
        }
    print(f"{args.preset}, batch {args.batch} x {args.seq}, {dtype}, {devices.name(device)}\n{table(rows)}")
    print(
        f"stored in {results.write(f'tokens-per-second-{args.preset}-b{args.batch}-s{args.seq}', rows, device)}"
    )


if __name__ == "__main__":
    cli.run(main)
