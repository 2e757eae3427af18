"""The optimizer step that pre-training runs and the benchmarks time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from openllama.data.loader import Batch
from openllama.model import Llama
from openllama.ops import grad_norm
from openllama.optim import AdamW
from openllama.training.micro_step import MicroStep, keep_gradients, micro_step, model_inputs
from openllama.training.ranks import Ranks


class StepResult(NamedTuple):
    """On the device: reading one waits for the step."""

    loss: torch.Tensor  # this process's share, nats per token: the sum over processes is the step's loss
    grad_norm: torch.Tensor  # of all processes, before clipping


def batch_loss(model: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """The summed cross-entropy of a packed batch, fp32."""
    return model(**model_inputs(batch, device))


def accumulate_gradients(model: Llama, world: int = 1) -> None:
    """Lets micro-batches add up in `.grad` as the gradients are made; of low-precision weights in fp32, for one process:
    DDP needs gradients in the weight's own dtype."""
    model.settings = model.settings._replace(accumulate=True)
    for p in model.parameters():
        if p.dtype != torch.float32 and world == 1:
            p.grad_dtype = torch.float32


def train_step(
    engine: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    targets: float,
    lr: float,
    clip: float,
    world: int = 1,
    micro_step: MicroStep = micro_step,
) -> StepResult:
    """One optimizer step over the micro-batches of every process. Nothing in it waits for the device.

    `targets` is the number of labels that count in the whole step, of all `world` processes. The loss is the sum over
    all real tokens divided by it, so a micro-batch with more padding weighs less, as it should, and the same tokens
    give the same step however they are split. `engine` is the model, or DDP around it. Our AdamW clips the gradients
    as it reads them, which leaves them unclipped; other optimizers get them clipped.
    """
    device = next(engine.parameters()).device
    # DDP averages over processes, so each one's sum is scaled up by their number
    scale = torch.full((), world / targets, device=device)
    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last or world == 1 else engine.no_sync():  # type: ignore[operator]
            total += micro_step(engine, batch, scale)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # of a capturable optimizer
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    if isinstance(optimizer, AdamW):
        norm, scale = grad_norm([p.grad for p in engine.parameters() if p.grad is not None], clip)
        optimizer.step(grad_scale=scale)
    else:
        norm = torch.nn.utils.clip_grad_norm_(engine.parameters(), clip)
        optimizer.step()
    if world == 1:
        keep_gradients(engine)
    else:
        optimizer.zero_grad(set_to_none=True)
    return StepResult(total / world, norm)


def squared_mean_length(batches: Sequence[Batch]) -> float:
    """sum(len^2) / sum(len) of the packed documents: the `seq` whose attention costs as much (see flops_per_token)."""
    squares = sum(float(b.cu_seqlens.diff().double().square().sum()) for b in batches)
    return squares / sum(b.ids.numel() for b in batches)


def held_out_loss(
    loss: Callable[[Batch], torch.Tensor], batches: Iterable[Batch], ranks: Ranks | None = None
) -> float:
    """Mean cross-entropy of the labels that count, nats per token, over the batches of all processes."""
    total, targets = 0.0, 0
    for batch in batches:
        total += float(loss(batch))
        targets += batch.targets
    if ranks is not None:
        total, targets = ranks.sum(total, targets)
    return total / max(1, targets)
