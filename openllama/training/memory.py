"""What an optimizer step holds, estimated before it is allocated: backward makes again only what would not fit."""

from __future__ import annotations

from typing import get_args

import psutil
import torch

from openllama.block import Recompute
from openllama.config import ModelConfig
from openllama.model import Llama
from openllama.optim import AdamW

GRADIENT = 4  # bytes a parameter: micro-batches add up in fp32
RESERVE = 2**30  # beside what is counted, which alone comes within 0.5 GiB of steps' peaks on an H200
USABLE = 0.95  # of what is free: the rest is lost between pieces


def activation_bytes(
    config: ModelConfig, tokens: int, dtype: torch.dtype, recompute: Recompute = "norm"
) -> float:
    """What forward keeps for backward of a micro-batch of `tokens`, as openllama/block.py's table has it.

    Elements a token and layer: a residual sum for each half (2 hidden), their norms' outputs (2 hidden), QKV and attention's
    output, gate and up (2 intermediate), their product. `recompute` says which of them are made again; the layer that
    backward is at holds all of them.

    Raises:
        ValueError: another `recompute` than block.py has.
    """
    c = config
    sums, norms, gate_up, act = 2 * c.hidden, 2 * c.hidden, 2 * c.intermediate, c.intermediate
    attention = (2 * c.heads + 2 * c.kv_heads) * c.head_dim
    kept = {
        "none": sums + norms + attention + gate_up + act,
        "norm": sums + attention + gate_up,
        "mlp": sums + attention,
        "full": sums,
    }
    if recompute not in kept:
        raise ValueError(f"recompute: got {recompute!r}, takes one of {', '.join(kept)}")
    return float((kept[recompute] * c.layers + kept["none"]) * tokens * dtype.itemsize)


def step_bytes(parameters: int, bytes_a_parameter: float, activations: float) -> float:
    """Of a step; `bytes_a_parameter` as AdamW.state_bytes() counts them."""
    return parameters * (bytes_a_parameter + GRADIENT) + activations + RESERVE


def choose_recompute(model: Llama, optimizer: AdamW, tokens: int) -> Recompute:
    """The first of none, norm, mlp and full with which a step over micro-batches of `tokens` fits where the model lies; full
    where none does. To be asked before the first step: of all that a step holds, weights alone are there."""
    weight = model.embed.weight
    parameters = list(model.parameters())
    usable = usable_bytes(weight.device) + sum(p.nbytes for p in parameters)
    count, each = sum(p.numel() for p in parameters), optimizer.state_bytes()
    choices: tuple[Recompute, ...] = get_args(Recompute)
    for recompute in choices:
        activations = activation_bytes(model.config, tokens, weight.dtype, recompute)
        if step_bytes(count, each, activations) <= usable:
            return recompute
    return choices[-1]


def usable_bytes(device: torch.device) -> float:
    """What tensors of this process can have beside what they have."""
    if device.type != "cuda":
        return USABLE * psutil.virtual_memory().available
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return USABLE * (torch.cuda.mem_get_info(device)[0] + kept)
