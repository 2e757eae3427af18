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
        backend: `cuda`, `triton`, `cpu`, `reference`; None chooses.

    Returns:
        (..., intermediate) in gate_up's dtype.

    Saves gate_up for backward.

    Raises:
        TypeError, ValueError: a wrong dtype, an odd last dimension, or a backend that can't run.
    """
    checks.is_float("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: got shape {tuple(gate_up.shape)}, takes (..., 2 * intermediate)")
    chosen = backends.choose("swiglu", gate_up, backend)
    if chosen == "reference":
        return swiglu_reference(gate_up)
    return _Swiglu.apply(gate_up, chosen)


@torch.no_grad()
def swiglu_backward_(dact: torch.Tensor, gate_up: torch.Tensor, *, backend: str | None = None) -> None:
    """Turns (dact, gate_up) into (act, dgate_up) in one pass, in place: what the backward of a block needs, which
    keeps gate_up alone and wants act again for the gradient of the down projection.

    Args:
        dact: (rows, intermediate), the gradient of act; becomes act.
        gate_up: (rows, 2 * intermediate), of the same dtype; becomes its own gradient. Rows contiguous in both.
        backend: as in `swiglu`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, or rows that are not contiguous; before anything is written.
    """
    checks.is_float("gate_up", gate_up)
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: got shape {tuple(gate_up.shape)}, takes (rows, 2 * intermediate)")
    checks.has_shape("dact", dact, (gate_up.shape[0], gate_up.shape[1] // 2), "rows, intermediate")
    checks.same_dtype("dact", dact, gate_up.dtype, "gate_up")
    checks.same_device("dact", dact, gate_up.device, "gate_up")
    for name, t in (("dact", dact), ("gate_up", gate_up)):
        if t.numel() and (t.stride(1) != 1 or (len(t) > 1 and t.stride(0) < t.shape[1])):
            raise ValueError(f"{name}: got strides {t.stride()}, takes contiguous rows that don't overlap")
    chosen = backends.choose("swiglu", gate_up, backend)
    if chosen == "reference":
        dgate_up, act = _backward_reference(dact, gate_up)
        gate_up.copy_(dgate_up)
        dact.copy_(act)
    else:
        library.ops(chosen).swiglu_bwd_(dact, gate_up)
        torch.autograd.graph.increment_version((dact, gate_up))


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, backend: str) -> torch.Tensor:
        flat = checks.rows(gate_up, gate_up.shape[-1])
        ctx.save_for_backward(flat)
        ctx.shape, ctx.backend = gate_up.shape, backend
        act = library.ops(backend).swiglu_fwd(flat)
        return act.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    @once_differentiable  # a second derivative raises instead of being wrong
    def backward(ctx: Any, dact: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        dgate_up = library.ops(ctx.backend).swiglu_bwd(checks.rows(dact, dact.shape[-1]), flat)
        return dgate_up.view(ctx.shape), None


@library.fake("swiglu_fwd")
def _(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@library.fake("swiglu_bwd")
def _(dact: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty(gate_up.shape)


@library.fake("swiglu_bwd_")
def _(dact: torch.Tensor, gate_up: torch.Tensor) -> None:
    return None


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The definition, in fp32 (fp64 for fp64 inputs)."""
    wide = gate_up if gate_up.dtype == torch.float64 else gate_up.float()
    gate, up = wide.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def _backward_reference(dact: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate_up, act)."""
    with torch.enable_grad():
        leaf = gate_up.detach().requires_grad_()
        act = swiglu_reference(leaf)
        return torch.autograd.grad(act, leaf, dact)[0], act.detach()
