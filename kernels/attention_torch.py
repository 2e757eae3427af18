"""PyTorch's fused kernels for attention, and which of them.

SDPA for dense batches; its varlen kernel for bf16 and fp16 packs on a GPU; for other packs SDPA document by document, which
on a GPU waits for their lengths. While torch.compile traces, where the lengths are not known, those are one SDPA call with
a mask, whose work grows with the square of the pack.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

varlen_attn = None
if torch.backends.cuda.is_built():  # its import takes seconds, and it runs on a GPU only
    with contextlib.suppress(ImportError):  # a torch built without it
        from torch.nn.attention.varlen import varlen_attn

# On Hopper cuDNN is 1.5 to 2 times as fast as FlashAttention 2, which is torch's own first choice.
_CUDNN_FIRST = (
    (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.cudnn_sdp_enabled),
    (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.flash_sdp_enabled),
    (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.mem_efficient_sdp_enabled),
    (SDPBackend.MATH, torch.backends.cuda.math_sdp_enabled),
)

_VARLEN_DOCUMENTS = 65_535  # the second dimension of its grid

# torch before 2.12 takes fewer key-value heads without being told.
_VARLEN_GQA = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


class _ReadableGradient(torch.autograd.Function):
    """The identity; cuDNN's backward takes the gradient for a dense one, whatever its strides."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
        return readable(dout.contiguous())


def readable(t: torch.Tensor) -> torch.Tensor:
    """`t`, or a copy where PyTorch's CUDA kernels could not read it: they take 16 bytes at a time, unchecked."""
    start = 0 if torch.compiler.is_compiling() else t.storage_offset()  # Dynamo has no offsets
    step = 16 // t.element_size()
    if t.stride(-1) == 1 and not any(n % step for n in (start, *t.stride()[:-1])):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def fused(q, k, v, cu_seqlens, max_seqlen, causal: bool, scale: float) -> torch.Tensor:
    """`attention`, whose arguments are checked."""
    if not q.is_cuda:
        return _fused(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    out = _fused(*map(readable, (q, k, v)), cu_seqlens, max_seqlen, causal, scale)
    return _ReadableGradient.apply(out) if out.requires_grad else out


def _fused(q, k, v, cu_seqlens, max_seqlen, causal: bool, scale: float) -> torch.Tensor:
    if cu_seqlens is None:
        return _sdpa(q, k, v, causal, scale)
    if _varlen_takes(q):
        return _varlen(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    if torch.compiler.is_compiling():
        return _masked(q, k, v, cu_seqlens, causal, scale)
    return _per_document(q, k, v, cu_seqlens, causal, scale)


def _varlen_takes(q: torch.Tensor) -> bool:
    head_dim = q.shape[-1]
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and varlen_attn is not None and half and head_dim % 8 == 0 and head_dim <= 256


def _sdpa(q, k, v, causal: bool, scale: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, heads, seq, head_dim)
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}  # Dynamo takes no symbolic bool here
    with _fastest(q):
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, **grouped)
    return out.transpose(1, 2)


def _fastest(q: torch.Tensor) -> contextlib.AbstractContextManager:
    """The order in which SDPA looks for a kernel. Where nothing is learned, lengths vary, and cuDNN would make a plan
    for each: torch's own order."""
    if torch.compiler.is_compiling() or not (q.is_cuda and q.requires_grad and _is_hopper(q.device.index)):
        return contextlib.nullcontext()
    allowed = [kernel for kernel, is_enabled in _CUDNN_FIRST if is_enabled()]  # who forbids one means it
    return sdpa_kernel(allowed, set_priority=True) if allowed else contextlib.nullcontext()


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


def _varlen(q, k, v, cu_seqlens, max_seqlen, causal: bool, scale: float) -> torch.Tensor:
    if len(cu_seqlens) > _VARLEN_DOCUMENTS + 1:
        return _varlen_pieces(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    options = {"enable_gqa": True} if _VARLEN_GQA and q.shape[1] != k.shape[1] else {}
    window = (-1, 0) if causal else (-1, -1)
    max_seqlen = max(max_seqlen, 2)  # for 1 it counts on a token in every document
    return varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=window, **options
    )


def _varlen_pieces(q, k, v, cu_seqlens, max_seqlen, causal: bool, scale: float) -> torch.Tensor:
    borders = cu_seqlens.split(_VARLEN_DOCUMENTS)  # each piece lacks its end, which is the next one's start
    cuts = [*(int(piece[0]) for piece in borders), len(q)]
    return torch.cat([
        _varlen(*(t[a:b] for t in (q, k, v)), F.pad(piece, (0, 1), value=b) - a, max_seqlen, causal, scale)
        for piece, a, b in zip(borders, cuts, cuts[1:]) if a < b
    ])  # fmt: skip


def _masked(q, k, v, cu_seqlens, causal: bool, scale: float) -> torch.Tensor:
    """One SDPA call for the whole pack, in which documents don't see each other."""
    return _sdpa(q[None], k[None], v[None], False, scale, allowed(q, len(q), causal, cu_seqlens))[0]


def allowed(q, seq: int, causal: bool, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """(seq, seq): whether a token sees another."""
    seen = torch.ones(seq, seq, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    if cu_seqlens is None:
        return seen
    index = torch.arange(seq, device=q.device, dtype=torch.int32)
    document = torch.bucketize(index, cu_seqlens[1:], right=True)
    return seen & (document[:, None] == document[None, :])


def _per_document(q, k, v, cu_seqlens, causal: bool, scale: float) -> torch.Tensor:
    """One SDPA call for each run of neighbouring documents of equal length."""
    runs = [
        (length, len(list(run))) for length, run in itertools.groupby(cu_seqlens.diff().tolist()) if length
    ]
    pieces = zip(runs, *(t.split([length * count for length, count in runs]) for t in (q, k, v)))
    return torch.cat([_sdpa_run(count, *piece, causal, scale) for (_, count), *piece in pieces])


def _sdpa_run(count: int, q, k, v, causal: bool, scale: float) -> torch.Tensor:
    """`count` packed documents of one length as a dense batch."""
    batch = [t.unflatten(0, (count, -1)) for t in (q, k, v)]
    if q.device.type == "cpu" and count * k.shape[1] < torch.get_num_threads():
        # SDPA's CPU backward splits the work over documents and key heads: give it a key head for each query head
        batch[1:] = [t.repeat_interleave(q.shape[1] // t.shape[2], dim=2) for t in batch[1:]]
    return _sdpa(*batch, causal, scale).flatten(0, 1)
