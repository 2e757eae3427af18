"""The optimizer step that pre-training runs and the benchmarks time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from openllama.data.loader import Batch


class StepResult(NamedTuple):
    """Of all processes but for the loss, which is this process's share. On the device: reading one waits for the step."""

    loss: torch.Tensor  # nats per token; the sum over processes is the step's loss
    grad_norm: torch.Tensor  # before clipping
    targets: float  # labels that counted


def batch_loss(model: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """The summed cross-entropy of a packed batch, fp32."""

    def put(t: torch.Tensor) -> torch.Tensor:
        return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t

    return model(
        put(batch.ids),
        put(batch.positions),
        put(batch.cu_seqlens),
        batch.max_seqlen,
        labels=put(batch.labels),
    )


def accumulate_in_fp32(model: torch.nn.Module) -> None:
    """Lets the micro-batches of low-precision weights add up in fp32 gradients. For one process: DDP and ZeRO need
    gradients in the weight's own dtype."""
    for p in model.parameters():
        if p.dtype != torch.float32:
            p.grad_dtype = torch.float32


def train_step(
    engine: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    lr: float,
    clip: float,
    accelerator: Accelerator,
) -> StepResult:
    """One optimizer step over the micro-batches of every process.

    Its loss is the sum over all real tokens divided by their number, so a micro-batch with more padding weighs less, as
    it should, and the same tokens give the same step however they are split.
    """
    world, device = accelerator.num_processes, accelerator.device
    targets = sum_over_ranks(sum(b.targets for b in batches), accelerator)
    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last or world == 1 else accelerator.no_sync(engine):
            loss = batch_loss(engine, batch, device)
            # DDP averages over processes, so each one's sum is scaled up by their number
            accelerator.backward(loss * (world / targets))
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(engine.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total / targets, norm, targets)


def squared_mean_length(batches: Sequence[Batch]) -> float:
    """sum(len^2) / sum(len) of the packed documents: the `seq` whose attention costs as much (see flops_per_token)."""
    squares = sum(float(b.cu_seqlens.diff().double().square().sum()) for b in batches)
    return squares / sum(b.ids.numel() for b in batches)


def sum_over_ranks(value: float, accelerator: Accelerator) -> float:
    """The sum of a number over all processes."""
    if accelerator.num_processes == 1:
        return value
    value_here = torch.tensor(value, device=accelerator.device, dtype=torch.float64)
    total: Any = accelerator.reduce(value_here, "sum")
    return total.item()
