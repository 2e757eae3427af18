"""Rotary's Triton twin: the formulas are in ../rotary.py. A program takes a few heads of a token (or of
several tokens, where there are few heads), and reads the token's cos and sin once for all of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import guard, vector

# Pairs of a program of 4 warps: 8 a thread, which is one 16-byte access of bf16 in each half.
_PAIRS = 1_024


@triton.jit
def _turn(
    x, out, cos, sin, positions, offset, tokens, table_rows, x_stride, out_stride, sign,
    ROTATED: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, TOKEN_TILE: tl.constexpr, HEAD_TILE: tl.constexpr, PAIR_TILE: tl.constexpr,
    TAIL_TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Turns the first 2 HALF columns of the first ROTATED of HEADS heads; other heads are copied. TAIL_TILE:
    of the columns after those, which are copied; 0 where there are none, or out is x."""
    head_tiles: tl.constexpr = (HEADS + HEAD_TILE - 1) // HEAD_TILE
    program = tl.program_id(0)
    tokens_here = (program // head_tiles).to(tl.int64) * TOKEN_TILE + tl.arange(0, TOKEN_TILE)
    token = tokens_here[:, None, None]
    head = program % head_tiles * HEAD_TILE + tl.arange(0, HEAD_TILE)[None, :, None]
    pair = tl.arange(0, PAIR_TILE)[None, None, :]
    here = token < tokens
    there = here & (head < HEADS)  # (TOKEN_TILE, HEAD_TILE, 1)
    x += token * x_stride * VECTOR + head * HEAD_DIM
    out += token * out_stride * VECTOR + head * HEAD_DIM

    if INTERLEAVED:  # one access for both of a pair
        both = tl.arange(0, 2 * PAIR_TILE)[None, None, :]
        inside = there & (both < 2 * HALF)
        packed = tl.load(x + both, mask=inside, other=0.0)
        a, b = tl.split(tl.reshape(packed, (TOKEN_TILE, HEAD_TILE, PAIR_TILE, 2)))
    else:
        inside = there & (pair < HALF)
        a = tl.load(x + pair, mask=inside, other=0.0)
        b = tl.load(x + HALF + pair, mask=inside, other=0.0)

    position = tokens_here
    if positions is not None:
        position = tl.load(positions + tokens_here, mask=tokens_here < tokens, other=0).to(tl.int64)
    position = position[:, None, None] + offset
    known = here & (position >= 0) & (position < table_rows) & (pair < HALF)
    # a position outside the tables turns the token into NaN
    c = tl.load(cos + position * HALF + pair, mask=known, other=float("nan"))
    s = tl.load(sin + position * HALF + pair, mask=known, other=float("nan")) * sign
    first, second = a.to(tl.float32), b.to(tl.float32)
    kind = x.dtype.element_ty
    turned_a, turned_b = (first * c - second * s).to(kind), (second * c + first * s).to(kind)
    if ROTATED < HEADS:
        turned_a, turned_b = tl.where(head < ROTATED, turned_a, a), tl.where(head < ROTATED, turned_b, b)

    if INTERLEAVED:
        joined = tl.reshape(tl.join(turned_a, turned_b), (TOKEN_TILE, HEAD_TILE, 2 * PAIR_TILE))
        tl.store(out + both, joined, mask=inside)
    else:
        tl.store(out + pair, turned_a, mask=inside)
        tl.store(out + HALF + pair, turned_b, mask=inside)
    if TAIL_TILE > 0:
        column = 2 * HALF + tl.arange(0, TAIL_TILE)[None, None, :]
        inside = there & (column < HEAD_DIM)
        tl.store(out + column, tl.load(x + column, mask=inside), mask=inside)


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None,
    offset: int, rotated: int, interleaved: bool, inverse: bool,
) -> torch.Tensor:  # fmt: skip
    """x (tokens, heads, head_dim), its first `rotated` heads turned by cos and sin (positions, rotary_dim /
    2)."""
    out = x.new_empty(x.shape)
    _launch(x, out, cos, sin, positions, offset, rotated, interleaved, inverse)
    return out


def rotary_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None,
    offset: int, rotated: int, interleaved: bool, inverse: bool,
) -> None:  # fmt: skip
    """The same in place: what does not turn is not touched."""
    _launch(x, x, cos, sin, positions, offset, rotated, interleaved, inverse)


def rotary_pack(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    positions: torch.Tensor, inverse: bool,
) -> torch.Tensor:  # fmt: skip
    """(tokens, heads, head_dim) each; q and k turned, and v, side by side."""
    heads = [t.shape[1] for t in (q, k, v)]
    out = q.new_empty(q.shape[0], sum(heads), q.shape[2])
    to_q, to_k, to_v = out.split(heads, dim=1)
    _launch(q, to_q, cos, sin, positions, 0, heads[0], False, inverse)
    _launch(k, to_k, cos, sin, positions, 0, heads[1], False, inverse)
    to_v.copy_(v)
    return out


def _launch(x, out, cos, sin, positions, offset, rotated, interleaved, inverse) -> None:
    tokens, heads, head_dim = x.shape
    half = cos.shape[1]
    covered, tail = (rotated, 0) if out is x else (heads, head_dim - 2 * half)
    if tokens == 0 or covered == 0 or (half == 0 and tail == 0):
        return
    pair_tile = triton.next_power_of_2(max(1, half))
    room = max(1, _PAIRS // pair_tile)
    head_tile = min(room, triton.next_power_of_2(covered))
    token_tile = room // head_tile
    v = vector(x, out)
    with guard(x):
        _turn[(triton.cdiv(tokens, token_tile) * triton.cdiv(covered, head_tile),)](
            x, out, cos, sin, positions, offset, tokens, cos.shape[0], x.stride(0) // v, out.stride(0) // v,
            -1.0 if inverse else 1.0,
            ROTATED=rotated, HEADS=covered, HEAD_DIM=head_dim, HALF=half, INTERLEAVED=interleaved,
            TOKEN_TILE=token_tile, HEAD_TILE=head_tile, PAIR_TILE=pair_tile,
            TAIL_TILE=triton.next_power_of_2(tail) if tail else 0, VECTOR=v, num_warps=4,
        )  # fmt: skip
