"""Rotary position embedding: the pair (a, b) of a head's elements i turns by position * theta^(-2i/d).

    a' = a cos - b sin
    b' = b cos + a sin

Su et al., "RoFormer", 2021. A pair is (x[i], x[i + d/2]), the half-split layout of HuggingFace's Llama, or, interleaved,
(x[2i], x[2i + 1]), the paper's. d is head_dim, or less: the elements from d on pass through (GPT-NeoX, Phi). It works on a
packed QKV activation: q and k heads turn, v heads are left alone, so that a projection's output is never taken apart.
The gradient is the turn by the opposite angle; nothing but the positions is kept for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import backend as backends
from . import checks, library


def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | int,
    rotated: int | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Turns the first `rotated` heads of `x` by their position's angles.

    Args:
        x: (tokens, heads, head_dim), fp32, bf16, fp16 or fp64; a slice of a wider row is read without a copy.
        cos, sin: (positions, rotary_dim / 2), fp32, from `rotary_tables`. They get no gradient. The first rotary_dim
            elements of a head turn, at most head_dim; the others are passed through.
        positions: (tokens), int32 or int64, each below the tables' rows; or a number n: token i stands at n + i.
        rotated: how many heads turn, the first ones; None: all. The others are passed through.
        interleaved: pairs lie side by side, (2i, 2i + 1); else half of rotary_dim apart, (i, i + rotary_dim / 2).
        inverse: turn back, by the opposite angles: what the gradient of the turn is.
        inplace: write into x (its values before are lost, so do this to a fresh projection only). No leaf that requires
            grad, and none of several views.
        backend: `cuda`, `triton`, `cpu`, `reference`; None chooses.

    Returns:
        x's shape and dtype; x itself when inplace.

    Saves the positions and tables for backward.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or count, a number n beyond the tables. RuntimeError: a
        position outside them (checked where the tensors are on the CPU).
    """
    rotated = _check(x, cos, sin, positions, rotated)
    cos, sin = cos.detach(), sin.detach()  # constants, on every backend
    dense = _is_dense(x)
    chosen = backends.choose("rotary", x, backend)
    if chosen == "reference":
        _check_positions(positions, cos)
        turned = rotary_reference(x, cos, -sin if inverse else sin, positions, rotated, interleaved)
        return x.copy_(turned) if inplace else turned
    if inplace:
        _check_inplace(x, dense)
    # Dynamo can't trace a view that a Function writes to: the graph copies
    compiling = torch.compiler.is_compiling()
    dense_x = x if dense else x.clone(memory_format=torch.contiguous_format)
    at, offset = (as_int32(positions), 0) if isinstance(positions, torch.Tensor) else (None, positions)
    turn = (rotated, bool(interleaved), bool(inverse))
    turned = _Rotary.apply(dense_x, cos, sin, at, offset, turn, inplace and not compiling, chosen)
    return x.copy_(turned) if inplace and compiling else turned


@torch.no_grad()
def rotary_pack(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    inverse: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """q and k turned, and v, side by side in one tensor: as the gradients of a packed QKV are made of attention's.

    Half-split pairs. Has no gradient: it is what a backward is made of.

    Args:
        q, k, v: (tokens, heads or kv_heads, head_dim), of one dtype; heads that don't lie side by side are copied first.
        positions: (tokens), int32 or int64.
        cos, sin, inverse, backend: as in `rotary`.

    Returns:
        (tokens, heads + 2 kv_heads, head_dim).

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device. RuntimeError: a position outside the tables, as in `rotary`.
    """
    checks.is_integer("positions", positions)
    _check(q, cos, sin, positions, None)
    for name, t in (("k", k), ("v", v)):
        checks.has_shape(name, t, (len(q), *t.shape[1:2], q.shape[2]), "tokens, kv_heads, head_dim")
        checks.same_dtype(name, t, q.dtype, "q")
        checks.same_device(name, t, q.device, "q")
    chosen = backends.choose("rotary", q, backend)
    if chosen == "reference":
        _check_positions(positions, cos)
        sin = -sin if inverse else sin
        return torch.cat([*(rotary_reference(t, cos, sin, positions) for t in (q, k)), v], dim=1)
    q, k, v = (t if _is_dense(t) else t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    positions = as_int32(positions).contiguous()
    return library.ops(chosen).rotary_pack(
        q, k, v, cos.contiguous(), sin.contiguous(), positions, bool(inverse)
    )


def _check(x, cos, sin, positions, rotated: int | None) -> int:
    checks.is_float("x", x)
    if x.dim() != 3 or x.shape[2] % 2 or x.shape[2] == 0:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, takes (tokens, heads, head_dim) with an even head_dim"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        checks.same_dtype(name, table, torch.float32, "the tables")
        checks.same_device(name, table, x.device, "x")
    if cos.dim() != 2 or not 1 <= cos.shape[1] <= x.shape[2] // 2:
        raise ValueError(
            f"cos: got shape {tuple(cos.shape)}, takes (positions, rotary_dim / 2) with rotary_dim from 2 to "
            f"head_dim={x.shape[2]}"
        )
    checks.has_shape("sin", sin, cos.shape, "cos's shape")
    if isinstance(positions, (int, torch.SymInt)):
        if not 0 <= positions <= len(cos) - len(x):
            raise ValueError(
                f"positions: got {positions} for {len(x)} tokens, takes a number of at least 0 that leaves the last "
                f"one within the tables' {len(cos)} rows"
            )
    else:
        checks.is_integer("positions", positions)
        checks.has_shape("positions", positions, (x.shape[0],), "tokens")
        checks.same_device("positions", positions, x.device, "x")
    rotated = x.shape[1] if rotated is None else rotated
    if not isinstance(rotated, (int, torch.SymInt)) or not 0 <= rotated <= x.shape[1]:
        raise ValueError(f"rotated: got {rotated}, takes 0 to x's {x.shape[1]} heads")
    return rotated


def _check_inplace(x: torch.Tensor, dense: bool) -> None:
    """What autograd would refuse after the kernel has written, and what would be turned more than once."""
    if not dense or (len(x) > 1 and x.stride(0) < x.shape[1] * x.shape[2]):
        raise ValueError(
            f"x: got strides {x.stride()}, takes heads that lie side by side and tokens that don't overlap when inplace"
        )
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return
    base = x if x._base is None else x._base
    several = _is_one_of_several(x)
    if base.is_leaf or several:
        what = (
            "one of several views, as of split()"
            if several
            else "a leaf that requires grad, or a view of one"
        )
        raise ValueError(f"x: got {what}, takes a fresh projection's output when inplace")


_VIEWS = ("View", "UnsafeView", "Reshape", "Slice", "Select", "Alias", "Transpose", "Permute", "Unsqueeze", "Squeeze",
          "Narrow", "Unflatten", "Expand", "AsStrided", "TBackward")  # fmt: skip


def _is_one_of_several(x: torch.Tensor) -> bool:
    """Whether `x` is one of the views that split(), chunk() or unbind() made, or a view of one."""
    node = x.grad_fn
    while node is not None and x._base is not None:
        if type(node).__name__.startswith(("Split", "Unbind", "Chunk")):
            return True
        if not type(node).__name__.startswith(_VIEWS) or not node.next_functions:
            return False
        node = node.next_functions[0][0]
    return False


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the heads of a token lie side by side. (is_contiguous() says nothing of the stride of a single head.)"""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def as_int32(positions: torch.Tensor) -> torch.Tensor:
    """`positions` as kernels take them; what is out of range stays outside all tables."""
    if positions.dtype == torch.int32:
        return positions
    return positions.clamp(-(2**31), 2**31 - 1).to(torch.int32)  # 2^32 must not become 0


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x,
        cos,
        sin,
        positions,
        offset: int,
        turn: tuple[int, bool, bool],
        inplace: bool,
        backend: str,
    ) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        positions = None if positions is None else positions.contiguous()
        ctx.save_for_backward(cos, sin, positions)
        ctx.offset, ctx.turn, ctx.backend = offset, turn, backend
        ops = library.ops(backend)
        if not inplace:
            return ops.rotary(x, cos, sin, positions, offset, *turn)
        ops.rotary_(x, cos, sin, positions, offset, *turn)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable  # a second derivative raises instead of being wrong
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        dout = dout if _is_dense(dout) else dout.clone(memory_format=torch.contiguous_format)
        rotated, interleaved, inverse = ctx.turn
        turn_back = (rotated, interleaved, not inverse)
        dx = library.ops(ctx.backend).rotary(dout, cos, sin, positions, ctx.offset, *turn_back)
        return dx, None, None, None, None, None, None, None


@library.fake("rotary")
def _(
    x: torch.Tensor, cos, sin, positions, offset: int, rotated: int, interleaved: bool, inverse: bool
) -> torch.Tensor:
    return x.new_empty(x.shape)


@library.fake("rotary_")
def _(
    x: torch.Tensor, cos, sin, positions, offset: int, rotated: int, interleaved: bool, inverse: bool
) -> None:
    return None


@library.fake("rotary_pack")
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos, sin, positions, inverse: bool) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1] + k.shape[1] + v.shape[1], q.shape[2]))


def _check_positions(positions: torch.Tensor | int, cos: torch.Tensor) -> None:
    """On the CPU only, as the values of a GPU tensor would have to be waited for; indexing would read -1 as the last."""
    if not isinstance(positions, torch.Tensor):
        return
    if positions.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = (positions < 0) | (positions >= len(cos))
    if outside.any():
        i = int(outside.nonzero()[0])
        raise RuntimeError(
            f"rotary: positions[{i}] is {positions[i]}, outside the table's {len(cos)} rows; "
            "raise max_positions or shorten the input"
        )


def rotary_reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | int,
    rotated: int | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """The definition, in fp32 (fp64 for fp64 inputs)."""
    rotated = x.shape[1] if rotated is None else rotated
    half = cos.shape[1]
    at = positions if isinstance(positions, torch.Tensor) else slice(positions, positions + len(x))
    c, s = cos[at][:, None], sin[at][:, None]
    turning = x[:, :rotated, : 2 * half]
    wide = turning.double() if x.dtype == torch.float64 else turning.float()
    pairs = wide.unflatten(-1, (half, 2) if interleaved else (2, half))
    dim = -1 if interleaved else -2
    first, second = pairs.unbind(dim)  # (tokens, rotated, rotary_dim / 2)
    turned = torch.stack([first * c - second * s, second * c + first * s], dim).flatten(-2).to(x.dtype)
    heads = torch.cat([turned, x[:, :rotated, 2 * half :]], dim=2)
    return torch.cat([heads, x[:, rotated:]], dim=1)
