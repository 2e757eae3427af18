"""x *= factor in place, with a factor that only the device knows.

The gradient that arrives at a summed loss is 1 more often than not. A GPU then neither reads nor writes x, and the host
does not wait to learn of it.
"""

from __future__ import annotations

import torch

from . import backend as backends
from . import checks, library


@torch.no_grad()
def scale_(x: torch.Tensor, factor: torch.Tensor, *, backend: str | None = None) -> None:
    """Multiplies `x` in place; each product is rounded once.

    Args:
        x: (..., columns), fp32, bf16, fp16 or fp64; any strides without overlap.
        factor: one number on x's device, of any float dtype.
        backend: `cuda`, `reference`; None chooses.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, or a backend that can't run.
    """
    checks.is_float("x", x)
    checks.is_float("factor", factor)
    checks.same_device("factor", factor, x.device, "x")
    if factor.numel() != 1:
        raise ValueError(f"factor: got shape {tuple(factor.shape)}, takes one number")
    rows = x.view(1, -1) if x.is_contiguous() else x
    readable = rows.dim() == 2 and (rows.stride(1) == 1 or rows.shape[1] <= 1)
    if readable and len(rows) > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(f"x: got strides {x.stride()}, takes rows that don't overlap")
    if backends.choose("scale", x, backend) == "cuda" and readable:
        torch.ops.openllama.scale_(rows, factor.float().reshape(1))
        torch.autograd.graph.increment_version(x)
    elif x.device.type == "cpu" and factor == 1:
        torch.autograd.graph.increment_version(x)  # it is used up all the same
    else:
        x.mul_(factor.reshape(1))  # with no dimension, it would be rounded to x's dtype first


@library.fake("scale_")
def _(x: torch.Tensor, factor: torch.Tensor) -> None:
    return None
