"""RMSNorm with the residual add fused in.

    h = x + residual
    y = h / sqrt(mean(h^2) + eps) * weight

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. The add is fused because the norm reads the sum
anyway: one pass over memory less. All arithmetic is fp32 and y is rounded once (HuggingFace's Llama rounds to the
input's dtype before it multiplies by the weight).
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch.autograd.function import once_differentiable

from . import backend as backends
from . import checks, library


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = ...,
    residual: None = ...,
    *,
    backend: str | None = ...,
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor, *, backend: str | None = ...
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of `x` over its last dimension, or of `x + residual`.

    Args:
        x: (..., hidden), fp32, bf16, fp16 or fp64; any strides (contiguous rows are read without a copy).
        weight: (hidden), x's dtype or fp32.
        eps: added to the mean square; at least 0.
        residual: x's shape, dtype and device, or None.
        backend: `cuda`, `triton`, `cpu`, `reference`; None chooses.

    Returns:
        y in x's shape and dtype; with a residual (y, h), where h = x + residual is the next residual.

    Saves h (or x) and rstd (fp32, one a row) for backward.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, eps, or a backend that can't run.
    """
    _check(x, weight, eps, residual)
    chosen = backends.choose("rms_norm", x, backend, x.shape[-1])
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps, residual)
    return _RmsNorm.apply(x, weight, residual, eps, chosen)


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None) -> None:
    checks.is_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: got a scalar, takes (..., hidden)")
    checks.has_shape("weight", weight, (x.shape[-1],), "x's last dimension")
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"weight: got {weight.dtype}, takes x's {x.dtype} or torch.float32")
    checks.same_device("weight", weight, x.device, "x")
    checks.in_range("eps", eps, 0, 1, "a number from 0 to 1")
    if residual is not None:
        checks.has_shape("residual", residual, x.shape, "x's shape")
        checks.same_dtype("residual", residual, x.dtype, "x")
        checks.same_device("residual", residual, x.device, "x")


# ---------------------------------------------------------------- forward and backward by hand


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, rstd) without autograd, for a backward written by hand; unchecked.

    x, residual: (rows, hidden), rows contiguous. h is x + residual, or x itself; rstd is fp32 (fp64 for fp64), (rows,).
    """
    if backend == "reference":
        h = x if residual is None else x + residual
        wide, rstd = _wide(h, eps)
        return (wide * rstd[:, None] * weight).to(x.dtype), h, rstd
    y, h, rstd = library.ops(backend).rms_norm_fwd(x, residual, weight.contiguous(), eps)
    return y, x if residual is None else h, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    backend: str,
    need_dx: bool = True,
    need_dweight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dweight) of what `rms_norm_forward` gave; unchecked. dh, the gradient of h, is added to dx.

    dx: (rows, hidden) in h's dtype; dweight: (hidden,) in fp32 (fp64 for fp64). What isn't needed is empty.
    """
    if backend != "reference":
        return library.ops(backend).rms_norm_bwd(dy, dh, h, weight.contiguous(), rstd, need_dx, need_dweight)
    normed = h.to(rstd.dtype) * rstd[:, None]
    scaled = dy * weight.to(rstd.dtype)
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd[:, None]
    return (dx if dh is None else dx + dh).to(h.dtype), (dy * normed).sum(0)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None,
        eps: float,
        backend: str,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        hidden = x.shape[-1]
        flat = checks.rows(x, hidden)
        flat_residual = None if residual is None else checks.rows(residual, hidden)
        y, h, rstd = rms_norm_forward(flat, weight, eps, flat_residual, backend)
        ctx.backend = backend
        ctx.save_for_backward(h, weight, rstd)
        ctx.set_materialize_grads(False)  # an output that nothing uses has no gradient to read
        # one output, not (y, None): dynamo can't trace the gradient of None
        return y.view(x.shape) if residual is None else (y.view(x.shape), h.view(x.shape))

    @staticmethod
    @once_differentiable  # a second derivative raises instead of being wrong
    def backward(
        ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        h, weight, rstd = ctx.saved_tensors
        hidden = h.shape[-1]
        need_x, need_weight, need_residual, *_ = ctx.needs_input_grad
        if dy is None:
            dweight = torch.zeros_like(weight) if need_weight else None
            return dh if need_x else None, dweight, dh if need_residual else None, None, None
        dx, dweight = rms_norm_backward(
            checks.rows(dy, hidden),
            None if dh is None else checks.rows(dh, hidden),
            h,
            weight,
            rstd,
            ctx.backend,
            need_x or need_residual,
            need_weight,
        )
        dx = dx.view(dy.shape) if need_x or need_residual else None
        dweight = dweight.to(weight.dtype) if need_weight else None
        return dx if need_x else None, dweight, dx if need_residual else None, None, None


@library.fake("rms_norm_fwd")
def _(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> tuple:
    rows, hidden = x.shape
    h = x.new_empty((0, 0) if residual is None else (rows, hidden))
    return x.new_empty((rows, hidden)), h, x.new_empty((rows,), dtype=torch.float32)


@library.fake("rms_norm_bwd")
def _(dy, dh, h, weight, rstd, need_dx: bool, need_dweight: bool) -> tuple:
    rows, hidden = h.shape
    dx = h.new_empty((rows, hidden) if need_dx else (0, 0))
    return dx, h.new_empty((hidden if need_dweight else 0,), dtype=torch.float32)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The definition, in fp32 (fp64 for fp64 inputs)."""
    h = x if residual is None else x + residual
    wide, rstd = _wide(h, eps)
    y = (wide * rstd[..., None] * weight).to(x.dtype)
    return y if residual is None else (y, h)


def _wide(h: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """h in fp32 (fp64 for fp64), and rstd of its rows."""
    wide = h.double() if h.dtype == torch.float64 else h.float()
    return wide, torch.rsqrt(wide.square().mean(-1) + eps)
