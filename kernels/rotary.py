"""Rotary position embedding: the pair (x[i], x[i + d/2]) of a head turns by position * theta^(-2i/d).

    out[i]       = x[i] cos - x[i + d/2] sin
    out[i + d/2] = x[i + d/2] cos + x[i] sin

Su et al., "RoFormer", 2021, in the half-split layout of HuggingFace's Llama. It works on a packed QKV activation: q and
k heads turn, v heads are left alone, so that a projection's output is never taken apart. The gradient is the turn by
the opposite angle; nothing but the positions is kept for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import backend as backends
from . import checks, library

#: The kinds of rotary scaling that we build (HuggingFace's names), and the numbers that each takes.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    rotated: int | None = None,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Turns the first `rotated` heads of `x` by their position's angles.

    Args:
        x: (tokens, heads, head_dim), fp32, bf16, fp16 or fp64; a slice of a wider row is read without a copy.
        cos, sin: (positions, head_dim / 2), fp32, from `rotary_tables`. They get no gradient.
        positions: (tokens), int32 or int64, each below the tables' rows.
        rotated: how many heads turn, the first ones; None: all. The others are passed through.
        inplace: write into x (its values before are lost, so do this to a fresh projection only). No leaf that requires
            grad, and none of several views.
        backend: `cpu`, `reference`; None chooses.

    Returns:
        x's shape and dtype; x itself when inplace.

    Saves the positions and tables for backward.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or count. RuntimeError: a position outside the tables
        (checked where the tensors are on the CPU).
    """
    rotated = _check(x, cos, sin, positions, rotated)
    cos, sin = cos.detach(), sin.detach()  # constants, on every backend
    dense = _is_dense(x)
    chosen = backends.choose("rotary", x, backend)
    if chosen == "reference":
        _check_positions(positions, cos)
        out = rotary_reference(x, cos, sin, positions, rotated)
        return x.copy_(out) if inplace else out
    if inplace:
        _check_inplace(x, dense)
    compiling = (
        torch.compiler.is_compiling()
    )  # Dynamo can't trace a view that a Function writes to: the graph copies
    dense_x = x if dense else x.clone(memory_format=torch.contiguous_format)
    out = _Rotary.apply(dense_x, cos, sin, _as_int32(positions), rotated, inplace and not compiling, chosen)
    return x.copy_(out) if inplace and compiling else out


def rotary_tables(
    head_dim: int,
    max_positions: int,
    theta: float = 10000.0,
    scaling: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (max_positions, head_dim / 2), fp32: bf16 could not tell position 257 from 258.

    `scaling` is HuggingFace's dictionary: `rope_type` `linear` or `llama3` (with its factors), None for none.
    Computed in fp32 in HuggingFace's order of operations, so that checkpoints trained there see the same angles.
    Raises ValueError for an odd head_dim, a theta not above 0, an unknown or incomplete scaling.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: got {head_dim}, takes an even number of at least 2")
    if max_positions < 0:
        raise ValueError(f"max_positions: got {max_positions}, takes a whole number of at least 0")
    checks.in_range("theta", theta, 1e-37, 3e38, "a finite number above 0")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = _scale(1.0 / theta**exponent, scaling)
    angles = torch.arange(max_positions, device=device).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def check_rope_scaling(scaling: dict[str, Any], where: str) -> None:
    """Raises ValueError naming `where`, the key, what it got and what it takes."""
    kind = scaling.get("rope_type")
    if kind not in ROPE_KEYS:
        raise ValueError(f"{where}: got rope_type {kind!r}, takes one of {', '.join(ROPE_KEYS)}")
    takes = ROPE_KEYS[kind]
    for key in takes:
        value = scaling.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{where}: {key}: got {value!r}, takes a number above 0 for {kind!r}")
    for key in scaling.keys() - {"rope_type", *takes}:
        raise ValueError(f"{where}: {key}: unknown for {kind!r}, takes {', '.join(takes) or 'nothing more'}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(
            f"{where}: high_freq_factor: got {scaling['high_freq_factor']}, takes more than low_freq_factor="
            f"{scaling['low_freq_factor']}"
        )


def _scale(frequencies: torch.Tensor, scaling: dict[str, Any] | None) -> torch.Tensor:
    if scaling is None:
        return frequencies
    check_rope_scaling(scaling, "scaling")
    kind = scaling["rope_type"]
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    # Meta's rule for Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, a smooth blend between.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling["factor"] + blend * frequencies


def _check(x, cos, sin, positions, rotated: int | None) -> int:
    checks.is_float("x", x)
    if x.dim() != 3 or x.shape[2] % 2 or x.shape[2] == 0:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, takes (tokens, heads, head_dim) with an even head_dim"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        checks.same_dtype(name, table, torch.float32, "the tables")
        checks.has_shape(name, table, (*cos.shape[:1], x.shape[2] // 2), "positions, head_dim / 2")
        checks.same_device(name, table, x.device, "x")
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
    several = type(x.grad_fn).__name__.startswith(("Split", "Unbind", "Chunk"))
    if base.is_leaf or several:
        what = (
            "one of several views, as of split()"
            if several
            else "a leaf that requires grad, or a view of one"
        )
        raise ValueError(f"x: got {what}, takes a fresh projection's output when inplace")


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the heads of a token lie side by side. (is_contiguous() says nothing of the stride of a single head.)"""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _as_int32(positions: torch.Tensor) -> torch.Tensor:
    if positions.dtype == torch.int32:
        return positions
    return positions.clamp(-(2**31), 2**31 - 1).to(torch.int32)  # 2^32 must not become 0


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin, positions, rotated: int, inplace: bool, backend: str) -> torch.Tensor:
        cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
        ctx.save_for_backward(cos, sin, positions)
        ctx.rotated, ctx.backend = rotated, backend
        ops = library.ops(backend)
        if not inplace:
            return ops.rotary(x, cos, sin, positions, 0, rotated, False, False)
        ops.rotary_(x, cos, sin, positions, 0, rotated, False, False)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable  # a second derivative raises instead of being wrong
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        dout = dout if _is_dense(dout) else dout.clone(memory_format=torch.contiguous_format)
        dx = library.ops(ctx.backend).rotary(dout, cos, sin, positions, 0, ctx.rotated, False, True)
        return dx, None, None, None, None, None, None


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


def _check_positions(positions: torch.Tensor, cos: torch.Tensor) -> None:
    """On the CPU only, as the values of a GPU tensor would have to be waited for; indexing would read -1 as the last."""
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
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, rotated: int | None = None
) -> torch.Tensor:
    """The definition, in fp32 (fp64 for fp64 inputs)."""
    rotated = x.shape[1] if rotated is None else rotated
    wide = x[:, :rotated].double() if x.dtype == torch.float64 else x[:, :rotated].float()
    first, second = wide.chunk(2, dim=-1)  # (tokens, rotated, head_dim / 2)
    c, s = cos[positions][:, None], sin[positions][:, None]
    turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)
    return torch.cat([turned, x[:, rotated:]], dim=1)
