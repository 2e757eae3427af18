"""What the Triton twins share: the size of the card, and how wide memory is accessed.

Triton joins neighbouring elements into one 16-byte access where it can prove that the address is a multiple
of 16 bytes and that the mask is the same for all of them. So kernels take a row's stride in units of
`vector(...)` elements, 16 bytes where possible, and multiply it by that constant.
"""

from __future__ import annotations

import functools
import math

import torch
import triton

_OF_AN_H100 = 132  # where there is no GPU (the interpreter, compiling ahead of time)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return _OF_AN_H100
    return torch.cuda.get_device_properties(device).multi_processor_count


def vector(*rows: torch.Tensor | None) -> int:
    """The most elements, up to 16 bytes, of which every stride of these rows is a multiple."""
    tensors = [t for t in rows if t is not None]
    return math.gcd(16 // tensors[0].element_size(), *(t.stride(0) for t in tensors))


def warps_for(elements: int) -> int:
    """Warps of a program for 16 elements a thread: two 16-byte accesses of bf16, four of fp32: enough on
    their way to hide memory's latency, in registers that leave a multiprocessor room for several programs."""
    return min(32, max(1, triton.next_power_of_2(elements) // 512))


def guard(t: torch.Tensor) -> torch.cuda.device_of:
    """Kernels start on the tensor's card, whichever is the current one."""
    return torch.cuda.device_of(t)
