"""quack's ops (CuTe DSL, Hopper and newer) at the level of their kernels.

Each function makes the step that is timed, or raises ModuleNotFoundError where the package is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

EPS = 1e-6
Step = Callable[[], object]


def rms_norm_fwd(x, residual: torch.Tensor | None, weight) -> Step:
    from quack.rmsnorm import rmsnorm_fwd

    return partial(rmsnorm_fwd, x, weight, residual=residual, eps=EPS, store_rstd=True)


def rms_norm_bwd(dy, dh: torch.Tensor | None, x, residual: torch.Tensor | None, weight) -> Step:
    from quack.rmsnorm import rmsnorm_bwd

    _, h, rstd = rms_norm_fwd(x, residual, weight)()
    return partial(rmsnorm_bwd, h, weight, dy, rstd, dresidual_out=dh, has_residual=residual is not None)


def rotary(x, cos, sin, rotated: int, inverse: bool) -> Step:
    """In place on the first heads of a packed QKV; x: (batch, seq, heads, head_dim)."""
    from quack.rotary import apply_rotary

    return partial(apply_rotary, x[:, :, :rotated], cos, sin, inplace=True, conjugate=inverse)


def cross_entropy(logits, labels) -> Step:
    """Forward, and the gradient over the logits."""
    from quack.cross_entropy import cross_entropy_fwd

    return partial(cross_entropy_fwd, logits, labels, return_dx=True, inplace_backward=True)
