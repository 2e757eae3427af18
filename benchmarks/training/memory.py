"""What a step of ours holds, estimated before anything is allocated: which form of AdamW fits, or how many layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.training.work import Work
from openllama.config import ModelConfig
from openllama.model import parameter_count
from openllama.optim import AdamW, Masters, Moments

RECOMPUTE = "norm"  # the model's default
GRADIENT = 4  # bytes a parameter: micro-batches add up in fp32
# Of the loss's chunks, workspaces of the matrix products, the largest single gradient, fragments.
RESERVE = 4 * 2**30


class Form(NamedTuple):
    """Of AdamW."""

    moments: Moments
    masters: Masters


# The fastest to the leanest. All keep masters exact.
FORMS = (
    Form("fp32", "fp32"),
    Form("fp32", "remainder"),
    Form("bf16", "remainder"),
    Form("8bit", "remainder"),
)


def activation_bytes(
    config: ModelConfig, tokens: int, dtype: torch.dtype, recompute: str = RECOMPUTE
) -> float:
    """What forward keeps for backward of a micro-batch of `tokens`, as openllama/block.py's table has it.

    Elements a token and layer: a residual sum for each half (2 hidden), their norms' outputs (2 hidden), QKV and attention's
    output, gate and up (2 intermediate). `recompute` says which of them are made again; the layer that backward is
    at holds all of them.
    """
    c = config
    sums, norms, gate_up = 2 * c.hidden, 2 * c.hidden, 2 * c.intermediate
    attention = (2 * c.heads + 2 * c.kv_heads) * c.head_dim
    kept = {
        "none": sums + norms + attention + gate_up,
        "norm": sums + attention + gate_up,
        "mlp": sums + attention,
        "full": sums,
    }
    if recompute not in kept:
        raise ValueError(f"recompute: got {recompute!r}, takes one of {', '.join(kept)}")
    return float((kept[recompute] * c.layers + kept["none"]) * tokens * dtype.itemsize)


def bytes_a_parameter(form: Form, dtype: torch.dtype) -> float:
    """Weight, masters, moments and gradient."""
    weight = torch.nn.Parameter(torch.empty(2**20, dtype=dtype, device="meta"))
    return AdamW([weight], moments=form.moments, masters=form.masters).state_bytes() + GRADIENT


def step_bytes(
    config: ModelConfig, tokens: int, dtype: torch.dtype, form: Form, recompute: str = RECOMPUTE
) -> float:
    """Of a step with micro-batches of `tokens`."""
    states = parameter_count(config) * bytes_a_parameter(form, dtype)
    return states + activation_bytes(config, tokens, dtype, recompute) + RESERVE


def fitting(forms: tuple[Form, ...], free: float, need: Callable[[Form], float]) -> tuple[Form, ...]:
    """The first form that fits into `free` bytes and those after it, for when the estimate was too low; the last at least."""
    first = next((i for i, form in enumerate(forms) if need(form) <= free), len(forms) - 1)
    return forms[first:]


def largest_cut(config: ModelConfig, work: Work, dtype: torch.dtype, free: float) -> ModelConfig:
    """The model with as many of its layers, at least one, as fit into `free` bytes in the leanest form."""

    def fits(layers: int) -> bool:
        cut = dataclasses.replace(config, layers=layers)
        return step_bytes(cut, work.batch * work.seq, dtype, FORMS[-1]) <= free

    layers = next((n for n in range(config.layers, 0, -1) if fits(n)), 1)
    return dataclasses.replace(config, layers=layers)


def free_bytes(device: torch.device) -> float:
    """What this process can have."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as lines:
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return float(kib) * 1024
