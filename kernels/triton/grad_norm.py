"""The Triton twin of the norm of the gradients: ../grad_norm.py.

As many programs as the card holds read all gradients once, each its chunks in turn; a second kernel sums
their parts. Both in a fixed order, so that every run on one card gives the same bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import lists
from .common import guard, processors
from .lists import find, pointer

_CHUNK, _TILE = 32_768, 4_096  # with 8 warps two 16-byte accesses of bf16 a thread

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["count", "chunks"])
def _squares(
    table, partial, count, chunks,
    GRAD: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, TILE)
    sums = tl.zeros((TILE,), tl.float32)
    for i in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = tl.cast(i, tl.int64)
        entry = table + find(table, count, chunk)
        size = tl.load(entry + count) * UNIT
        grad = pointer(tl.load(entry + 2 * count), UNIT, GRAD)
        begin = (chunk - tl.load(entry)) * CHUNK
        for start in range(begin, tl.minimum(begin + CHUNK, size), TILE):
            g = tl.load(grad + start + local, mask=start + local < size, other=0.0).to(tl.float32)
            sums += g * g
    tl.store(partial + tl.program_id(0), tl.sum(sums, axis=0))


@triton.jit
def _norm(partial, out, count, max_norm, TILE: tl.constexpr):
    sums = tl.zeros((TILE,), tl.float32)
    for begin in range(0, count, TILE):
        i = begin + tl.arange(0, TILE)
        sums += tl.load(partial + i, mask=i < count, other=0.0)
    norm = tl.sqrt_rn(tl.sum(sums, axis=0))
    clip = max_norm / (norm + 1e-6)
    tl.store(out, norm)
    tl.store(out + 1, tl.where(clip > 1.0, 1.0, clip))  # NaN stays


def grad_norm(grads: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    """(2,) fp32: the l2 norm of all gradients, and min(1, max_norm / (norm + 1e-6))."""
    if not len(grads):
        raise RuntimeError("openllama: grad_norm takes at least one tensor")
    device = grads[0].device
    sets = defaultdict(list)
    for g in grads:
        if g.dtype not in _DTYPES or not g.is_contiguous() or g.device != device:
            raise RuntimeError(
                "openllama: grad_norm takes contiguous float32, bfloat16 or float16 on one device"
            )
        if size := g.numel():
            sets[g.dtype, lists.unit(size, [g.data_ptr()])].append((size, g.data_ptr()))
    most = 8 * processors(device)  # 8 programs of 8 warps are what a multiprocessor holds
    partial = torch.empty(len(sets) * most, dtype=torch.float32, device=device)
    out = torch.empty(2, dtype=torch.float32, device=device)
    used = 0
    with guard(grads[0]):
        for (dtype, unit), entries in sets.items():
            table, chunks = lists.table(_CHUNK, unit, *zip(*entries))
            programs = min(chunks, most)
            _squares[(programs,)](
                lists.to_device(table, device), partial[used:], len(entries), chunks,
                GRAD=lists.DTYPES[dtype], UNIT=unit, CHUNK=_CHUNK, TILE=_TILE, num_warps=8,
            )  # fmt: skip
            used += programs
        _norm[(1,)](partial, out, used, max_norm, TILE=1_024, num_warps=8)
    return out
