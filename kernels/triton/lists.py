"""Kernels over a list of tensors in one launch: a table of their sizes and addresses is on the device, and
each program finds its piece by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}

# Pinning memory is not allowed while a CUDA graph is captured: calls outside leave room behind, of which those inside
# take pieces. There is room for at least 16 tables of the last call's length: a call makes up to 6 launches (gradients
# of three dtypes, with and without 16-byte accesses), and a graph may hold several calls.
_TABLES = 16
_LEAST = 2**17  # int64: 1 MiB
_room = torch.empty(0, dtype=torch.int64)
_captured: list[torch.Tensor] = []  # tables of CUDA graphs, which copy them again at each replay


def unit(size: int, addresses: Sequence[int]) -> int:
    """8 where a tensor's addresses and its end allow accesses of 16 bytes, else 1. Sizes in the table are in
    this unit, so that Triton knows it too."""
    return 1 if size % 8 or any(a % 16 for a in addresses) else 8


def table(chunk: int, unit: int, sizes: Sequence[int], *columns: Sequence[int]) -> tuple[list[int], int]:
    """(table, number of chunks): for each tensor the number of its first chunk of `chunk` elements, then for
    each its size in `unit`, then `columns`."""
    starts, chunks = [], 0
    for size in sizes:
        starts.append(chunks)
        chunks += -(-size // chunk)
    flat = [*starts, *(size // unit for size in sizes)]
    for column in columns:
        flat += column
    return flat, chunks


def to_device(values: list[int], device: torch.device) -> torch.Tensor:
    """int64, without waiting for the device. Raises RuntimeError in the capture of a graph for which calls outside have
    left no room."""
    global _room
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    size = len(values)
    if not torch.cuda.is_current_stream_capturing():
        if len(_room) < _TABLES * size:
            # more than has to be there, as what is left of the last room is lost
            _room = torch.empty(max(_LEAST, 2 * _TABLES * size), dtype=torch.int64, pin_memory=True)
        return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
    if len(_room) < size:
        raise RuntimeError(
            "openllama: a CUDA graph takes this call after it was made once outside of the graph"
        )
    host, _room = _room[:size], _room[size:]
    host.copy_(torch.tensor(values, dtype=torch.int64))
    _captured.append(host)
    return host.to(device, non_blocking=True)


@triton.jit
def find(starts, count, chunk):
    """The tensor of a chunk: the last of `count` ascending starts that is at most `chunk`."""
    low = chunk * 0
    high = low + count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= chunk
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def pointer(address, UNIT: tl.constexpr, dtype: tl.constexpr):
    to = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(to, 16) if UNIT > 1 else to
