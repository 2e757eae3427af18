"""The projection to queries, keys and values, with rotary:

    qkv = x [w_q | w_k | w_v]^T,   the heads of q and k turned by their positions' angles

On Hopper one kernel (csrc/hopper/linear_rotary.cu) turns a tile while the next one is multiplied, on its way to memory.
Elsewhere they are `matmul` and `rotary`, in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import backend as backends
from . import checks, library
from .matmul import linears
from .rotary import as_int32, rotary

_HEAD_DIMS = (64, 128)
_WIDTH = 128  # half a tile: its columns are those of one weight


@torch.no_grad()
def linear_rotary(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    head_dim: int,
    rotated: int,
    *,
    tune: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """The heads of x's projection, the first `rotated` turned. Has no gradient: it is what a block's forward is made of.

    Args:
        x: (tokens, hidden).
        weights: (n, hidden), of x's dtype, whose outputs lie side by side: one, or q's, k's and v's.
        cos, sin: (positions, rotary_dim / 2), fp32, from `rotary_tables`; pairs are half-split.
        positions: (tokens), int32 or int64, each below the tables' rows.
        head_dim: a divisor of the weights' rows in all.
        rotated: how many heads turn, the first ones.
        tune: as in `matmul`, where that is used.
        backend: `cuda` (Hopper, bf16 and fp16, head_dim 64 or 128 that turns as a whole, weights of a multiple of 128 rows),
            `reference`: `matmul` and `rotary` as they choose; None chooses.

    Returns:
        (tokens, heads, head_dim) in x's dtype, contiguous.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or count, or a backend that can't run. RuntimeError: a position
        outside the tables, as in `rotary`; on `cuda` the kernel stops.
    """
    heads = _check(x, weights, head_dim, rotated)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.same_dtype(name, table, torch.float32, "the tables")
        checks.same_device(name, table, x.device, "x")
    checks.is_integer("positions", positions)
    checks.has_shape("positions", positions, (len(x),), "tokens")
    reason = _why_not(x, weights, cos, sin, head_dim)
    if backends.choose_product("linear_rotary", x, backend, reason) == "cuda":
        positions = as_int32(positions).contiguous()
        return torch.ops.openllama.linear_rotary(x, list(weights), cos, sin, positions, head_dim, rotated)
    out = linears(x, weights, tune=tune)
    return rotary(out.view(len(x), heads, head_dim), cos, sin, positions, rotated, inplace=True)


def _check(x: torch.Tensor, weights: Sequence[torch.Tensor], head_dim: int, rotated: int) -> int:
    """The number of heads."""
    shapes = checks.linear(x, weights)
    if not shapes or any(len(shape) != 2 or shape[1] != x.shape[1] for shape in shapes):
        raise ValueError(f"weights: got shapes {shapes}, takes some of (n, {x.shape[1]})")
    columns = sum(shape[0] for shape in shapes)
    if head_dim < 1 or columns % head_dim:
        raise ValueError(f"head_dim: got {head_dim}, takes a divisor of the weights' {columns} rows")
    if not 0 <= rotated <= columns // head_dim:
        raise ValueError(f"rotated: got {rotated}, takes 0 to {columns // head_dim} heads")
    return columns // head_dim


def _why_not(
    x: torch.Tensor, weights: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, head_dim: int
) -> str:
    """Why the kernel can't take such operands; empty when it can."""
    if head_dim not in _HEAD_DIMS or 2 * cos.shape[-1] != head_dim:
        return f"head_dim {head_dim} with rotary_dim {2 * cos.shape[-1]}; it takes 64 or 128 in both"
    if len(weights) > 3 or any(len(w) == 0 or len(w) % _WIDTH for w in weights):
        rows = [len(w) for w in weights]
        return f"weights of {rows} rows; it takes one to three, of a multiple of {_WIDTH} each"
    matrices = (x, *weights)
    if not (all(map(checks.tma_reads, matrices)) and cos.is_contiguous() and sin.is_contiguous()):
        return (
            f"got shapes {[tuple(t.shape) for t in matrices]} and strides {[t.stride() for t in matrices]}, takes contiguous "
            "tables and rows, of widths and strides that are multiples of 8, on addresses of multiples of 16"
        )
    return ""


@library.fake("linear_rotary")
def _(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    head_dim: int,
    rotated: int,
) -> torch.Tensor:
    return x.new_empty(len(x), sum(len(w) for w in weights) // head_dim, head_dim)
