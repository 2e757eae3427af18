"""Whether speed costs accuracy: `python -m benchmarks.same_answer --preset 125m --steps 100`.

From the same weights, over the same batches of Python's own source, HuggingFace's model trains in fp32, which is the reference;
then the same model in bf16, and ours in bf16. Ours has to stay as near to the reference as HuggingFace's bf16 does:
the losses of all steps, and at the first step each parameter's gradient.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.peers import hf as peers
from benchmarks.training import weights
from benchmarks.training.ours import Ours
from openllama import cli, devices, hf
from openllama.config import ModelConfig
from openllama.data.loader import Batch
from openllama.presets import PRESETS, preset
from openllama.training.micro_step import micro_step

Run = tuple[
    list[float], dict[str, torch.Tensor]
]  # the loss of each step; the first step's gradients, by our names


def source_batches(batch: int, seq: int, count: int) -> list[Batch]:
    """Documents of the standard library's source, a byte an id: text that a model learns from, on every machine."""
    wanted, text = count * (batch * seq + 1), b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= wanted:
            break
    text *= -(-wanted // len(text))
    rows = torch.tensor(list(text[:wanted])).view(count, -1)
    positions = torch.arange(seq, dtype=torch.int32).repeat(batch)
    borders = torch.arange(0, batch * seq + 1, seq, dtype=torch.int32)
    return [Batch(r[:-1].clone(), r[1:].clone(), positions, borders, seq, batch * seq) for r in rows]


def theirs(config: ModelConfig, device: torch.device, dtype: torch.dtype, batches: Sequence[Batch]) -> Run:
    rows = len(batches[0].cu_seqlens) - 1
    side = peers.build(config, device, dtype, rows)
    side.loss(batches[0], batches[0].targets).backward()
    named = dict(side.model.named_parameters())
    grads: dict[str, list[torch.Tensor]] = {}
    for part in hf.layout(config):
        grads.setdefault(part.ours, []).append(named[part.name].grad.double().cpu())
    side.optimizer.zero_grad()
    losses = [float(side.step([b])) for b in batches]
    return losses, {name: torch.cat(parts) for name, parts in grads.items()}


def ours(config: ModelConfig, device: torch.device, dtype: torch.dtype, batches: Sequence[Batch]) -> Run:
    tokens, seq = len(batches[0].ids), batches[0].max_seqlen
    side = Ours(weights.our_model(config, device, dtype), tokens, seq)
    micro_step(side.model, batches[0], torch.full((), 1 / batches[0].targets, device=device))
    grads = {name: p.grad.double().cpu() for name, p in side.model.named_parameters() if p.grad is not None}
    side.optimizer.zero_grad()
    return [float(side.step([b])) for b in batches], grads


def gaps(run: Run, reference: Run) -> tuple[list[float], dict[str, float]]:
    """How far a run's losses are from the reference's, in nats, and each gradient, relative to its norm."""
    losses = [abs(a - b) for a, b in zip(run[0], reference[0])]
    grads = {name: float((run[1][name] - g).norm() / g.norm()) for name, g in reference[1].items()}
    return losses, grads


def rows(shape: dict[str, Any], low: str, made: dict[str, Run], reference: Run) -> list[dict[str, Any]]:
    """A row for each run, and how it stands to the reference."""
    by_impl = {impl: gaps(run, reference) for impl, run in made.items()}
    peer = by_impl["hf:sdpa"]
    return [
        {
            "bench": "same_answer",
            "shape": shape,
            "impl": impl,
            "dtype": low,
            "ms": None,
            "rate": None,
            "unit": "nats",
            "loss_gap_max": max(losses),
            "loss_gap_mean": statistics.fmean(losses),
            "grad_gap_max": max(grads.values()),
            "grad_gap_median": statistics.median(grads.values()),
            "grads_farther_than_hf": sum(grads[name] > peer[1][name] for name in grads),
            "grad_gap_over_hf_max": max(grads[name] / max(peer[1][name], 1e-9) for name in grads),
            "grads": len(grads),
            "losses": [made[impl][0][0], made[impl][0][-1]],
        }
        for impl, (losses, grads) in by_impl.items()
    ]


def table(made: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'':10} {'loss gap, max':>14} {'mean':>9} {'gradient gap, max':>18} {'median':>9}  first and last loss"
    ]
    for r in made:
        lines.append(
            f"{r['impl']:10} {r['loss_gap_max']:>14.2e} {r['loss_gap_mean']:>9.2e} {r['grad_gap_max']:>18.2e} "
            f"{r['grad_gap_median']:>9.2e}  {r['losses'][0]:.4f} {r['losses'][1]:.4f}"
        )
    farther = next(r for r in made if r["impl"] == "ours")
    lines.append(
        f"gradients of ours that are farther: {farther['grads_farther_than_hf']} of {farther['grads']}, "
        f"at most {farther['grad_gap_over_hf_max']:.3f} times as far"
    )
    return "\n".join(lines)


def compare(
    config: ModelConfig, device: torch.device, low: torch.dtype, shape: dict[str, Any]
) -> list[dict[str, Any]]:
    config = weights.without_stable_embedding(config)  # which HuggingFace's Llama has not
    batches = source_batches(shape["batch"], shape["seq"], shape["steps"])
    reference = theirs(config, device, torch.float32, batches)
    made = {"hf:sdpa": theirs(config, device, low, batches), "ours": ours(config, device, low, batches)}
    return rows(shape, str(low).removeprefix("torch."), made, reference)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="125m", choices=list(PRESETS))
    for name, value in (("batch", 4), ("seq", 1024), ("steps", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    for name in ("batch", "seq", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: got {getattr(args, name)}, takes a whole number of at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = compare(preset(args.preset), device, torch.bfloat16, vars(args))
    print(f"{args.preset}, {args.steps} steps, bfloat16 beside fp32, {devices.name(device)}\n{table(made)}")
    print(f"stored in {results.write(f'same-answer-{args.preset}', made, device)}")


if __name__ == "__main__":
    cli.run(main)
