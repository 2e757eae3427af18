"""The error rule, gradients, and memory layouts that the op tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Tensors = Sequence[torch.Tensor]

# How a tensor may lie in memory; all but the last hold the same values as the contiguous one.
LAYOUTS = ("contiguous", "slice", "inner slice", "misaligned", "every other", "transposed", "expanded")


def random(
    shape: Sequence[int], dtype: torch.dtype, device: str, seed: int, scale: float = 1.0
) -> torch.Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale).to(device, dtype)


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """`t` in another memory layout. What lies between its elements is NaN, so that a misread shows."""
    if layout == "contiguous" or t.dim() == 0:
        return t.contiguous()
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":  # zero strides, as in the gradient of a sum
        return t[:1, ..., :1].expand(t.shape) if t.numel() and t.dim() > 1 else t
    if layout == "misaligned":
        buffer = t.new_full((t.numel() + 1,), float("nan"))
        return buffer[1:].view(t.shape).copy_(t)
    dim = {"slice": min(1, t.dim() - 1), "inner slice": -1, "every other": -1}[layout]
    shape = list(t.shape)
    shape[dim] = 2 * shape[dim] if layout == "every other" else shape[dim] + 5
    buffer = t.new_full(shape, float("nan"))
    piece = buffer[..., ::2] if layout == "every other" else buffer.narrow(dim, 3, t.shape[dim])
    return piece.copy_(t)


def laid_far(t: torch.Tensor, path: Path) -> torch.Tensor:
    """`t` with its rows 2^31 elements and some apart, in a file that holds nothing in between."""
    stride = 2**31 + 64
    size = stride * (len(t) - 1) + t[0].numel()
    buffer = torch.from_file(str(path), shared=True, size=size, dtype=t.dtype)
    return buffer.as_strided(t.shape, (stride, *t[0].contiguous().stride())).copy_(t)


def ends(t: torch.Tensor) -> torch.Tensor:
    """The first and the last row of a tensor that is too large for more."""
    return torch.cat([t[:1], t[-1:]])


def run(
    op: Callable,
    tensors: Tensors,
    constants: Sequence = (),
    needs: Sequence[bool] | None = None,
    douts=None,
    **options,
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Outputs, and a gradient (or None) for each of `tensors`, which keep their memory layout."""
    needs = [True] * len(tensors) if needs is None else needs
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs)]
    outputs = op(*leaves, *constants, **options)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if not any(needs):
        return outputs, [None] * len(leaves)
    douts = gradients_like(outputs) if douts is None else douts
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    pairs = [(o, d.to(o)) for o, d in zip(outputs, douts) if o.requires_grad]
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [d for _, d in pairs]))
    return [o.detach() for o in outputs], [next(found) if need else None for need in needs]


def gradients_like(outputs: Tensors) -> list[torch.Tensor]:
    return [random(o.shape, o.dtype, o.device.type, seed=100 + i) for i, o in enumerate(outputs)]


def near(ours: torch.Tensor, theirs: torch.Tensor, ulps: float, name: str = "", floor: float = 0.0) -> None:
    """Equal shape and dtype; the largest difference is at most `ulps` ulps of the largest value (or of `floor`)."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
    if ours.numel() == 0:
        return
    assert ours.isfinite().all(), f"{name}: not finite"
    difference = (ours.double() - theirs.double()).abs().max().item()
    bound = ulps * torch.finfo(theirs.dtype).eps * max(theirs.double().abs().max().item(), floor)
    assert difference <= bound, f"{name}: differs by {difference:.3g}, at most {bound:.3g}"


def all_near(ours: Sequence, theirs: Sequence, ulps: float, name: str = "", floor: float = 0.0) -> None:
    """`near` for two lists, in which None meets None."""
    assert [o is None for o in ours] == [t is None for t in theirs], name
    for i, (o, t) in enumerate(zip(ours, theirs)):
        if o is not None:
            near(o, t, ulps, f"{name} [{i}]", floor)


def assert_error_rule(
    op: Callable,
    eager: Callable,
    tensors: Tensors,
    constants: Sequence = (),
    *,
    factor: float = 1.0,
    ulps: float = 1.0,
    floor: float = 0.0,
) -> None:
    """Each output and gradient of `op` is as near to the float64 result as eager PyTorch's in the same dtype.

    The largest error may be `factor` times eager's and `ulps` ulps of the largest exact value more; the root mean
    square error `factor` times eager's and half as many ulps of the root mean square more.
    `floor` is the size of the terms that cancel, where the exact value is near 0 by cancellation.
    """
    ours = run(op, tensors, constants)
    douts = gradients_like(ours[0])
    theirs = run(eager, tensors, constants, douts=douts)
    exact = run(eager, [t.double() for t in tensors], constants, douts=[d.double() for d in douts])
    for kind, *lists in zip(("output", "gradient"), ours, theirs, exact):
        for i, (o, t, e) in enumerate(zip(*lists)):
            assert o.shape == e.shape and o.isfinite().all()
            if o.numel() == 0:
                continue
            eps = torch.finfo(o.dtype).eps
            for measure, slack in ((_largest, ulps), (_root_mean_square, ulps / 2)):
                bound = factor * measure(t.double() - e) + slack * eps * max(measure(e), floor)
                error = measure(o.double() - e)
                assert error <= bound, (
                    f"{kind} {i}: {measure.__name__} error {error:.3g}, at most {bound:.3g}"
                )


def _largest(t: torch.Tensor) -> float:
    return t.abs().max().item()


def _root_mean_square(t: torch.Tensor) -> float:
    return t.square().mean().sqrt().item()
