"""The global l2 norm of a list of gradients, and the factor that clips it: one read of the gradients, no write.

    norm = sqrt(sum of all g^2);   scale = min(1, max_norm / (norm + 1e-6))

Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, with torch.nn.utils.clip_grad_norm_'s
1e-6. The optimizer multiplies by `scale` as it reads the gradients (`adamw`'s grad_scale), where a pass of its own would read
and write them all once more. Both numbers stay on the device: nothing waits for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import backend as backends
from . import checks, library

_PIECE = 2**16  # elements


def grad_norm(
    grads: Sequence[torch.Tensor], max_norm: float = math.inf, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm, scale) of all gradients together, fp32 of no dimension, on their device. Sums are in fp32 (the reference's in
    fp64 for fp64).

    A norm that is not finite gives the scale that arithmetic gives: NaN where the norm is NaN or max_norm infinite too,
    else 0 (and 0 times an infinite gradient is NaN again).

    Args:
        grads: on one device, of any shapes and float dtypes, mixed as they come. None at all: norm 0, scale 1, on the CPU.
        max_norm: above 0; infinite: no clipping.
        backend: `cuda`, `triton`, `reference`; None chooses.

    Raises:
        TypeError, ValueError: a wrong dtype, devices that differ, max_norm, a backend that can't run.
    """
    if not isinstance(max_norm, (int, float)) or not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm!r}, takes a number above 0")
    if not grads:
        return torch.zeros(()), torch.ones(())
    checks.is_float("grads[0]", grads[0])
    chosen = backends.choose("grad_norm", grads[0], backend)
    if chosen == "reference":
        _check(grads)
        return grad_norm_reference(grads, max_norm)
    try:
        readable = [g.float().contiguous() if g.dtype == torch.float64 else g.contiguous() for g in grads]
        norm, scale = library.ops(chosen).grad_norm(readable, max_norm).unbind()
    except (RuntimeError, AttributeError):
        _check(grads)  # names what is wrong, which the op can't
        raise
    return norm, scale


def _check(grads: Sequence[torch.Tensor]) -> None:
    for i, g in enumerate(grads):
        checks.is_float(f"grads[{i}]", g)
        checks.same_device(f"grads[{i}]", g, grads[0].device, "grads[0]")


@library.fake("grad_norm")
def _(grads: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    return grads[0].new_empty((2,), dtype=torch.float32)


@torch.no_grad()
def grad_norm_reference(
    grads: Sequence[torch.Tensor], max_norm: float = math.inf
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: a multi-tensor (foreach) pass."""
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    if grads[0].device.type == "cpu":  # sums of a whole tensor, one by one: 0.4% off for 50 million numbers
        grads = [piece for g in grads for piece in g.reshape(-1).split(_PIECE)]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads), 2, dtype=wide))).float()
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)
