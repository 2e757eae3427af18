"""SwiGLU on the packed output of one gate-up projection.

    act = gate * sigmoid(gate) * up,   gate_up = [gate | up]

Shazeer, "GLU Variants Improve Transformer", 2020. One pass reads gate and up and writes act; backward recomputes the
sigmoid instead of keeping it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import backend as backends
from . import checks, library


def swiglu(gate_up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """silu(gate) * up, computed in fp32 and rounded once.

    Args:
        gate_up: (..., 2 * intermediate), fp32, bf16, fp16 or fp64: the gate in the first half of a row, up in the
            second. Contiguous rows are read without a copy.
        backend: `cpu`, `reference`; None chooses.

    Returns:
        (..., intermediate) in gate_up's dtype.

    Saves gate_up for backward.

    Raises:
        TypeError, ValueError: a wrong dtype, an odd last dimension, or a backend that can't run.
    """
    checks.is_float("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: got shape {tuple(gate_up.shape)}, takes (..., 2 * intermediate)")
    if backends.choose("swiglu", gate_up, backend) == "reference":
        return swiglu_reference(gate_up)
    return _Swiglu.apply(gate_up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        flat = checks.rows(gate_up, gate_up.shape[-1])
        ctx.save_for_backward(flat)
        ctx.shape = gate_up.shape
        return torch.ops.openllama.swiglu_fwd(flat).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    @once_differentiable  # a second derivative raises instead of being wrong
    def backward(ctx: Any, dact: torch.Tensor) -> torch.Tensor:
        (flat,) = ctx.saved_tensors
        return torch.ops.openllama.swiglu_bwd(checks.rows(dact, dact.shape[-1]), flat).view(ctx.shape)


@library.fake("swiglu_fwd")
def _(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@library.fake("swiglu_bwd")
def _(dact: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty(gate_up.shape)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The definition, in fp32 (fp64 for fp64 inputs)."""
    wide = gate_up if gate_up.dtype == torch.float64 else gate_up.float()
    gate, up = wide.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
