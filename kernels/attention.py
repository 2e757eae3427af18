"""Scaled dot-product attention, dense or over packed documents.

    out = softmax(q k^T * scale + mask) v

Vaswani et al., 2017; grouped-query attention (Ainslie et al., 2023) when k and v have fewer heads. On Hopper dense batches
of head_dim 64 or 128 run on kernels of ours (csrc/hopper/attention_fwd.cu, attention_bwd.cu), after FlashAttention 3 (Shah et
al., 2024). All else is PyTorch's fused kernels (attention_torch.py).

`attention_decode` is the generation step: one query for each row of a key-value cache.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import backend as backends
from . import checks, library
from .attention_torch import allowed, fused, readable

_HEAD_DIMS = (64, 128)  # of our kernels
_PADDING = 128  # rows that they add to a sequence, at most
_MOST_ROWS = 2**30  # theirs, of all heads: tiles are numbered in 32 bits


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of q over k and v.

    Args:
        q: dense (batch, seq, heads, head_dim), or packed (tokens, heads, head_dim) with cu_seqlens.
        k, v: like q, with kv_heads heads, a divisor of heads. Slices of one packed QKV are read as they are (on a GPU,
            those that do not lie on 16 bytes are copied; a compiled graph takes its inputs' bases to lie so).
        cu_seqlens: (documents + 1) int32, from 0 to tokens, not falling: where each document starts. Empty documents
            are allowed. A token sees only its own document.
        max_seqlen: the longest document, needed with cu_seqlens.
        causal: a token sees itself and what is before it.
        scale: of the scores, above 0; None: head_dim ** -0.5.
        backend: `cuda` (Hopper, bf16 and fp16, dense, head_dim 64 or 128), `torch`, `reference`; None chooses.

    Returns:
        q's shape and dtype.

    `cuda` saves q, k, v, out and 4 bytes a query and head. Its dq adds up in any order, so runs may differ in their last
    bits; where torch is to be deterministic, it is left out.

    Raises:
        TypeError, ValueError: a wrong dtype, shape (k and v as long as q, for now), device or scale, or a backend that
        can't run. The values of cu_seqlens are checked on the CPU only.
    """
    _check(q, k, v, cu_seqlens, max_seqlen)
    chosen = _choose(q, cu_seqlens, backend)
    if q.numel() == 0:
        return q + 0 * (k.sum() + v.sum())  # nothing to attend to, but all three are part of the graph
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    checks.in_range("scale", scale, 1e-37, 3e38, "a finite number above 0")
    if chosen == "reference":
        return attention_reference(q, k, v, cu_seqlens, causal=causal, scale=scale)
    if chosen == "cuda":
        return _Attention.apply(*map(_loadable, (q, k, v)), scale, causal)
    return fused(q, k, v, cu_seqlens, max_seqlen, causal, scale)


def attention_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """Attention of one new token a row over the keys and values cached for it.

    Args:
        q: (rows, heads, head_dim).
        k, v: (rows, capacity, kv_heads, head_dim), kv_heads a divisor of heads; slices of one cache are read as they
            are (on a GPU, those that do not lie on 16 bytes are copied). Entries from a row's length on are not seen,
            but must be finite.
        lengths: (rows,) int32 or int64, 1 to capacity: how many entries a row sees, the new token's own among them.
        scale: of the scores, above 0; None: head_dim ** -0.5.

    Returns:
        q's shape and dtype.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or scale. The values of lengths are not checked.
    """
    _check_decode(q, k, v, lengths)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    checks.in_range("scale", scale, 1e-37, 3e38, "a finite number above 0")
    # A kernel of our own, which reads only what each row sees, would be chosen here; SDPA reads it all and masks.
    seen = torch.arange(k.shape[1], device=q.device) < lengths[:, None]  # (rows, capacity)
    if q.is_cuda:
        q, k, v = map(readable, (q, k, v))
    # The query heads that share a key head stand where a sequence would: no key is repeated, whatever the kernel.
    grouped = q.unflatten(1, (k.shape[2], -1))  # (rows, kv_heads, heads / kv_heads, head_dim)
    out = F.scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), seen[:, None, None], scale=scale
    )
    return out.flatten(1, 2)


def _choose(q: torch.Tensor, cu_seqlens: torch.Tensor | None, backend: str | None) -> str:
    """The backend. Raises ValueError where a forced one can't run."""
    chosen = backends.choose("attention", q, backend)
    if chosen != "cuda":
        return chosen
    reason = _why_not_ours(q, cu_seqlens)
    if reason and backend == "cuda":
        raise ValueError(
            f"backend: attention can't run on 'cuda' here: {reason}; takes None to choose one that can"
        )
    return "torch" if reason else chosen


def _why_not_ours(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> str:
    """Why our kernels can't run on such tensors, of a card and dtype that they run on; empty when they can."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, and can't see how tensors lie in memory"
    if cu_seqlens is not None:
        return "got cu_seqlens, takes dense batches"
    if q.shape[-1] not in _HEAD_DIMS:
        return f"got head_dim {q.shape[-1]}, takes 64 or 128"
    if q.shape[0] * q.shape[2] * (q.shape[1] + _PADDING) > _MOST_ROWS:
        return f"got shape {tuple(q.shape)}, takes up to {_MOST_ROWS} rows of all heads"
    if torch.are_deterministic_algorithms_enabled():
        return "torch is to be deterministic, and its dq adds up in any order"
    return ""


def attend_saving(q, k, v, cu_seqlens, max_seqlen) -> tuple[torch.Tensor, torch.Tensor] | None:
    """out of `attention` as it chooses, and lse, for `gradients`; None where it does not choose our kernels."""
    _check(q, k, v, cu_seqlens, max_seqlen)
    if q.numel() == 0 or _choose(q, cu_seqlens, None) != "cuda":
        return None
    return torch.ops.openllama.attention_fwd(*map(_loadable, (q, k, v)), q.shape[-1] ** -0.5, True)


def gradients(
    dout, q, k, v, out, lse, scale: float, causal: bool, angles: tuple | None = None
) -> torch.Tensor:
    """By our kernels dq, dk and dv side by side, as a packed QKV's; `angles`: cos, sin and positions (int32), by which
    rotary turned q and k, whose gradients turn back."""
    q, k, v = map(_loadable, (q, k, v))
    widths = [q.shape[2], k.shape[2], k.shape[2]]
    grads = q.new_empty(*q.shape[:2], sum(widths), q.shape[3])
    torch.ops.openllama.attention_bwd(
        _loadable(dout), q, k, v, out, lse, *grads.split(widths, dim=2), scale, causal, *angles or [None] * 3
    )
    return grads


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool):
        out, lse = torch.ops.openllama.attention_fwd(q, k, v, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    @once_differentiable  # a second derivative raises instead of being wrong
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, *_ = saved = ctx.saved_tensors
        widths = [q.shape[2], k.shape[2], k.shape[2]]
        grads = gradients(dout, *saved, ctx.scale, ctx.causal).split(widths, dim=2)
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad)), None, None


def _loadable(t: torch.Tensor) -> torch.Tensor:
    """`t`, or a copy where TMA could not load it: it wants strides above 0, and all on multiples of 16 bytes."""
    strides = [stride for size, stride in zip(t.shape[:-1], t.stride()) if size > 1]
    if t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(n > 0 and n % 8 == 0 for n in strides):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _check(q, k, v, cu_seqlens, max_seqlen) -> None:
    checks.is_float("q", q)
    dims = 4 if cu_seqlens is None else 3
    if q.dim() != dims:
        takes = "(batch, seq, heads, head_dim)" if dims == 4 else "(tokens, heads, head_dim) with cu_seqlens"
        raise ValueError(f"q: got shape {tuple(q.shape)}, takes {takes}")
    for name, t in (("k", k), ("v", v)):
        checks.same_dtype(name, t, q.dtype, "q")
        checks.same_device(name, t, q.device, "q")
        expected = (*q.shape[:-2], k.shape[-2], q.shape[-1]) if t.dim() == dims else q.shape
        checks.has_shape(name, t, expected, "q's shape with kv_heads heads")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"k: got {k.shape[-2]} heads, takes a divisor of q's {q.shape[-2]}")
    if cu_seqlens is None:
        return
    checks.same_dtype("cu_seqlens", cu_seqlens, torch.int32, "the document borders")
    checks.same_device("cu_seqlens", cu_seqlens, q.device, "q")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, takes (documents + 1,)")
    if not isinstance(max_seqlen, int):
        raise TypeError(
            f"max_seqlen: got {max_seqlen!r}, takes the length of the longest document with cu_seqlens"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != len(q) or borders != sorted(borders):
            raise ValueError(
                f"cu_seqlens: got {borders[:8]}..{borders[-1]}, takes 0 to q's {len(q)} tokens, not falling"
            )
        longest = max(end - start for start, end in itertools.pairwise(borders))
        if max_seqlen < longest:
            raise ValueError(f"max_seqlen: got {max_seqlen}, takes at least the longest document's {longest}")


def _check_decode(q, k, v, lengths) -> None:
    checks.is_float("q", q)
    if q.dim() != 3:
        raise ValueError(f"q: got shape {tuple(q.shape)}, takes (rows, heads, head_dim)")
    checks.is_tensor("k", k)
    if k.dim() != 4 or k.shape[2] == 0 or q.shape[1] % k.shape[2]:
        raise ValueError(
            f"k: got shape {tuple(k.shape)}, takes (rows, capacity, kv_heads, head_dim), kv_heads a divisor of q's "
            f"{q.shape[1]} heads"
        )
    for name, t in (("k", k), ("v", v)):
        checks.same_dtype(name, t, q.dtype, "q")
        checks.same_device(name, t, q.device, "q")
        checks.has_shape(name, t, (len(q), *k.shape[1:3], q.shape[2]), "rows, capacity, kv_heads, head_dim")
    checks.is_integer("lengths", lengths)
    checks.has_shape("lengths", lengths, (len(q),), "rows")
    checks.same_device("lengths", lengths, q.device, "q")


@library.fake("attention_fwd")
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool):
    batch, seq, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seq), dtype=torch.float32)


@library.fake("attention_bwd")
def _(*tensors_and_options) -> None:
    return None


def attention_reference(
    q, k, v, cu_seqlens=None, *, causal: bool = True, scale: float | None = None
) -> torch.Tensor:
    """The definition, with an explicit mask, in fp32 (fp64 for fp64 inputs)."""
    if cu_seqlens is not None:
        q, k, v = (t[None] for t in (q, k, v))
    seq, heads = q.shape[1], q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    qw = q.to(wide).transpose(1, 2)
    kw, vw = (t.to(wide).transpose(1, 2).repeat_interleave(heads // t.shape[2], dim=1) for t in (k, v))
    seen = allowed(q, seq, causal, cu_seqlens)
    scores = (qw @ kw.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    out = (scores.softmax(-1) @ vw).transpose(1, 2).to(q.dtype)
    return out if cu_seqlens is None else out[0]
