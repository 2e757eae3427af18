"""SwiGLU together with the linear layers beside it: forward with gate and up's, backward with the down projection's.

    [gate | up] = x [w_gate | w_up]^T,   act = gate * sigmoid(gate) * up,   dact = dout w_down

On Hopper one kernel (csrc/hopper/linear_swiglu.cu) does the elementwise work of a tile while the next one is multiplied:
gate and up are not read again for act, and dact never is in memory. Elsewhere they are `matmul` and `swiglu`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import backend as backends
from . import checks, library
from .matmul import linears, matmul
from .swiglu import swiglu, swiglu_backward_


@torch.no_grad()
def linear_swiglu(
    x: torch.Tensor, weights: Sequence[torch.Tensor], *, tune: bool = True, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate_up, act), each sum rounded once. Has no gradient: it is what a block's forward is made of.

    Args:
        x: (tokens, hidden).
        weights: of x's dtype: (2 * intermediate, hidden), gate's rows first, or the two halves apart.
        tune: as in `matmul`, where that is used.
        backend: `cuda` (Hopper, bf16 and fp16), `reference`: `matmul` and `swiglu` as they choose; None chooses.

    Returns:
        (tokens, 2 * intermediate) and (tokens, intermediate), in x's dtype, contiguous.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, or a backend that can't run.
    """
    shapes = checks.linear(x, weights)
    rows = sum(shape[0] for shape in shapes if shape)
    if len(shapes) not in (1, 2) or rows % 2 or set(shapes) != {(rows // len(shapes), x.shape[1])}:
        raise ValueError(
            f"weights: got shapes {shapes}, takes one (2 * intermediate, {x.shape[1]}) or two of half its rows"
        )
    halves = weights if len(weights) == 2 else weights[0].chunk(2)
    if _choose(x, backend, rows // 2, x, *halves) == "cuda":
        gate_up, act = x.new_empty(len(x), rows), x.new_empty(len(x), rows // 2)
        torch.ops.openllama.linear_swiglu_fwd(x, *halves, gate_up, act)
        return gate_up, act
    gate_up = linears(x, weights, tune=tune)
    return gate_up, swiglu(gate_up)


@torch.no_grad()
def linear_swiglu_backward_(
    dout: torch.Tensor,
    w_down: torch.Tensor,
    gate_up: torch.Tensor,
    with_act: bool = True,
    *,
    backend: str | None = None,
) -> torch.Tensor | None:
    """Of out = act w_down^T, as far as gate_up: turns gate_up into its gradient, in place.

    Args:
        dout: (tokens, hidden), out's gradient.
        w_down: (hidden, intermediate), of dout's dtype.
        gate_up: (tokens, 2 * intermediate), contiguous, of dout's dtype; becomes its own gradient.
        with_act: make act again, which the gradient of w_down is made of.
        backend: as in `linear_swiglu`.

    Returns:
        act, (tokens, intermediate), or None where it was not asked for.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, or a backend that can't run; before anything is written.
    """
    checks.is_float("dout", dout)
    for name, t in (("w_down", w_down), ("gate_up", gate_up)):
        checks.same_dtype(name, t, dout.dtype, "dout")
        checks.same_device(name, t, dout.device, "dout")
    if dout.dim() != 2 or w_down.dim() != 2 or w_down.shape[0] != dout.shape[1]:
        shapes = f"{tuple(dout.shape)} and {tuple(w_down.shape)}"
        raise ValueError(
            f"dout, w_down: got shapes {shapes}, takes (tokens, hidden) and (hidden, intermediate)"
        )
    intermediate = w_down.shape[1]
    checks.has_shape("gate_up", gate_up, (len(dout), 2 * intermediate), "tokens, 2 * intermediate")
    if not gate_up.is_contiguous():
        raise ValueError(f"gate_up: got strides {gate_up.stride()}, takes a contiguous tensor")
    if _choose(dout, backend, intermediate, dout, w_down, gate_up) == "cuda":
        act = dout.new_empty(len(dout), intermediate) if with_act else None
        torch.ops.openllama.linear_swiglu_bwd_(dout, w_down, gate_up, act)
        torch.autograd.graph.increment_version(gate_up)
        return act
    dact = matmul(dout, w_down)
    swiglu_backward_(dact, gate_up)  # makes act out of it
    return dact if with_act else None


def _choose(x: torch.Tensor, backend: str | None, intermediate: int, *matrices: torch.Tensor) -> str:
    """The backend. Raises ValueError where a forced one can't run."""
    well = all(map(checks.tma_reads, matrices)) and intermediate % 8 == 0
    reason = (
        ""
        if well
        else (
            f"got shapes {[tuple(t.shape) for t in matrices]} and strides {[t.stride() for t in matrices]}, takes contiguous "
            "rows, of widths and strides that are multiples of 8, on addresses of multiples of 16"
        )
    )
    return backends.choose_product("linear_swiglu", x, backend, reason)


@library.fake("linear_swiglu_fwd")
def _(
    x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor, gate_up: torch.Tensor, act: torch.Tensor
) -> None:
    return None


@library.fake("linear_swiglu_bwd_")
def _(dout: torch.Tensor, w_down: torch.Tensor, gate_up: torch.Tensor, act: torch.Tensor | None) -> None:
    return None
