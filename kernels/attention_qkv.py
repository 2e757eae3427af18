"""Attention over a packed QKV whose q and k heads rotary has turned, for blocks whose backward is written by hand:

    out = attention(qkv),   dqkv = the gradient of the QKV before the turn

On Hopper our kernels write the three gradients side by side, and turn those of q and k back on their way to memory.
Elsewhere backward is that of `attention`, then `rotary_pack`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .attention import attend_saving, attention, gradients
from .rotary import as_int32, rotary, rotary_pack


class Kept(NamedTuple):
    """What backward needs."""

    parts: tuple[torch.Tensor, ...]  # of the packed QKV: q, k and v
    out: torch.Tensor
    lse: torch.Tensor | None  # of our kernels; None: `out` has its graph


def attention_qkv(
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, Kept]:
    """Causal attention, scaled by head_dim ** -0.5.

    Args:
        qkv: dense (batch, seq, heads + 2 kv_heads, head_dim), or packed (tokens, heads + 2 kv_heads, head_dim) with
            cu_seqlens. It must not be written to before backward.
        cu_seqlens, max_seqlen: as in `attention`.

    Returns:
        out, (batch, seq, heads, head_dim) or (tokens, heads, head_dim), which has no gradient, and what
        `attention_qkv_backward` takes, once.

    Raises:
        TypeError, ValueError: as `attention`.
    """
    parts = qkv.detach().split([heads, kv_heads, kv_heads], dim=-2)
    saved = attend_saving(*parts, cu_seqlens, max_seqlen)
    if saved is not None:
        return saved[0], Kept(parts, *saved)
    with torch.enable_grad():
        parts = tuple(t.requires_grad_() for t in parts)
        out = attention(*parts, cu_seqlens, max_seqlen)
    return out.detach(), Kept(parts, out, None)


@torch.no_grad()
def attention_qkv_backward(
    dout: torch.Tensor, kept: Kept, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The gradient of the QKV before its q and k heads were turned.

    Args:
        dout: of out's shape and dtype.
        cos, sin: the tables that turned them, (positions, rotary_dim / 2), fp32; pairs are half-split.
        positions: (tokens), int32 or int64, of all sequences, each below the tables' rows.

    Returns:
        qkv's shape, contiguous.

    Raises:
        RuntimeError: a second call with the same `kept`, where attention is PyTorch's; a position outside the tables, as
        in `rotary` (our kernels stop).
    """
    if kept.lse is None:
        grads = torch.autograd.grad(kept.out, kept.parts, dout)
        packed = rotary_pack(*(t.flatten(0, -3) for t in grads), cos, sin, positions, inverse=True)
        return packed.view(*dout.shape[:-2], *packed.shape[1:])
    q, k, v = kept.parts
    whole = 2 * cos.shape[1] == q.shape[-1]
    angles = (cos.contiguous(), sin.contiguous(), as_int32(positions).contiguous()) if whole else None
    dqkv = gradients(dout, q, k, v, kept.out, kept.lse, q.shape[-1] ** -0.5, True, angles)
    if not whole:
        turned = q.shape[2] + k.shape[2]
        rotary(dqkv.flatten(0, -3), cos, sin, positions, turned, inverse=True, inplace=True)
    return dqkv
