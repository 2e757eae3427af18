"""The one table that chooses a backend for an op, by device, dtype and shape.

`cuda`, `triton` and `cpu` are our kernels; `torch` is a fused kernel that PyTorch ships, `cublaslt` NVIDIA's products as we
call them; `reference` is plain PyTorch and the definition of the op. A caller forces one with `backend=`, a user with OPENLLAMA_BACKEND (read at import) for every op
that has it; ops that have no such backend (or, of CUDA kernels for Hopper alone, not on this card) choose as if it were not
set. A forced backend that can't run raises and says why.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from . import library

#: Forces one backend for every op that has it; None: the table decides.
FORCED = os.environ.get("OPENLLAMA_BACKEND") or None

#: Backends of each op, the preferred one first. On a GPU: what benchmarks/results/ops-*.json has as the faster one, or
#: `cuda` where the two differ by less than a tenth, as its launch takes less of the host's time.
TABLE: dict[str, tuple[str, ...]] = {
    "rms_norm": ("cuda", "triton", "cpu", "reference"),
    "rotary": ("cuda", "triton", "cpu", "reference"),
    "swiglu": ("cuda", "triton", "cpu", "reference"),
    # of shapes that a kernel on Hopper takes, and tokens enough; their references are matmul and the other op
    "linear_swiglu": ("cuda", "reference"),
    "linear_rotary": ("cuda", "reference"),
    "cross_entropy": ("cuda", "triton", "cpu", "reference"),
    "linear_cross_entropy": ("cuda", "triton", "cpu", "reference"),
    "matmul": ("cublaslt", "reference"),
    "scale": ("cuda", "reference"),
    "embedding": ("cuda", "triton", "reference"),
    "adamw": ("cuda", "triton", "cpu", "reference"),
    "grad_norm": ("cuda", "triton", "reference"),
    "attention": ("cuda", "torch", "reference"),  # torch for most shapes
}

#: The shapes that an op's first backend takes, where not all: `explain` knows none. Others go to the next one.
SHAPES = {
    "linear_swiglu": "1024 tokens and more",
    "linear_rotary": "1024 tokens and more, head_dim 64 or 128",
    "attention": "dense batches of head_dim 64 or 128",
}

NAMES = ("cuda", "cublaslt", "triton", "cpu", "torch", "reference")

_KERNEL_DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cublaslt": (torch.bfloat16, torch.float16),  # fp32 products are torch's, which knows whether to use TF32
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}

# The CUDA backward keeps dweight in 4 bytes a column of shared memory: 64 KiB, which every card from sm_80 on has.
_MAX_CUDA_HIDDEN = 16_384

_HAS_TRITON = importlib.util.find_spec("triton") is not None

_MIN_CAPABILITY = 8  # setup.py compiles for sm_80 and newer
_HOPPER = {"linear_swiglu", "linear_rotary", "attention"}  # their CUDA kernels run there alone, in 16 bits

if FORCED is not None and FORCED not in NAMES:
    raise ValueError(f"OPENLLAMA_BACKEND: got {FORCED!r}, takes one of {', '.join(NAMES)}")


class Choice(NamedTuple):
    """The backend an op uses, and for each better one why not."""

    backend: str
    passed_over: tuple[tuple[str, str], ...]


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype, hidden: int = 0) -> str:
    """The reason why `backend` can't run `op` on such tensors; empty when it can."""
    if backend not in TABLE[op]:
        return f"{op} has no {backend} kernel yet"
    if backend in ("torch", "reference"):
        return ""
    if library.missing:
        return library.missing
    if device.type != ("cpu" if backend == "cpu" else "cuda"):
        return f"the tensors are on {device.type}"
    if backend in ("cuda", "cublaslt") and not library.has_cuda:
        return "the library was built without CUDA (no nvcc)"
    hopper = backend == "cuda" and op in _HOPPER
    if dtype not in _KERNEL_DTYPES[backend] or (hopper and dtype == torch.float32):
        return f"no {dtype} kernel"
    if backend == "cublaslt" and not library.has_cublaslt():
        return "torch has no cuBLASLt loaded"
    if backend == "cuda" and hidden > _MAX_CUDA_HIDDEN:
        return f"hidden={hidden} is over {_MAX_CUDA_HIDDEN}"
    if backend == "triton" and not _HAS_TRITON:
        return "the triton package is not installed"
    return _card_lacks(device.index, "hopper" if hopper else backend) if backend != "cpu" else ""


def _card_lacks(index: int | None, backend: str) -> str:
    """Why our kernels can't run on the card of this index (None: the current one); empty when they can. `backend` is
    "hopper" for those of `cuda` that only Hopper runs."""
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _ask_card(index, backend)


# A constant to torch.compile, which would trace into torch.cuda. torch.compiler.assume_constant_result does this as
# well, but first imports all of torch._dynamo, for as long as import torch takes.
_card_lacks._dynamo_marked_constant = True


@functools.cache
def _ask_card(index: int, backend: str) -> str:
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    major, minor = torch.cuda.get_device_capability(index)
    if major < _MIN_CAPABILITY:
        return f"compute capability {major}.{minor} is below {_MIN_CAPABILITY}.0"
    if backend == "hopper" and major != 9:
        return f"compute capability {major}.{minor} is not 9.0 (Hopper)"
    if backend == "triton":
        return ""
    # The CUDA runtime inside the library is the build's: a driver of its major version or newer can run it.
    built, driver = library.build_info()["cuda"], library.driver_version()
    if driver // 1000 < built // 1000:
        return f"the driver is for CUDA {_dotted(driver)}, the library was built with {_dotted(built)}"
    return ""


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def explain(op: str, device: torch.device, dtype: torch.dtype, hidden: int = 0) -> Choice:
    """What `op` uses on such tensors when nothing is forced, and why not something better."""
    passed_over = []
    for backend in TABLE[op]:
        reason = why_not(op, backend, device, dtype, hidden)
        if not reason:
            return Choice(backend, tuple(passed_over))
        passed_over.append((backend, reason))
    raise AssertionError(f"{op} has no reference")


def describe(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `explain` names, and for which shapes, where it does not take all."""
    used = explain(op, device, dtype).backend
    return f"{used} ({SHAPES[op]})" if op in SHAPES and used == TABLE[op][0] else used


def choose(op: str, x: torch.Tensor, backend: str | None, hidden: int = 0) -> str:
    """The backend for `op` on tensors like `x`; `backend` is the caller's, None to decide here.

    Raises ValueError where a forced backend can't run.
    """
    # kernels for one kind of card: a user who asks for CUDA on another means the ops that have it there
    spared = op in _HOPPER and FORCED == "cuda" and why_not(op, FORCED, x.device, x.dtype, hidden)
    if backend is None and FORCED is not None and FORCED in TABLE[op] and not spared:
        backend = FORCED
    if backend is None:
        for name in TABLE[op]:
            if not why_not(op, name, x.device, x.dtype, hidden):
                return name
    if backend not in NAMES:
        raise ValueError(f"backend: got {backend!r}, takes one of {', '.join(NAMES)} or None")
    reason = why_not(op, backend, x.device, x.dtype, hidden)
    if reason:
        raise ValueError(
            f"backend: {op} can't run on {backend!r} here: {reason}; takes None to choose one that can"
        )
    return backend


#: Under this, a product's tiles of 128 tokens by 256 columns leave too many processors idle.
_MIN_TOKENS = 1024


def choose_product(op: str, x: torch.Tensor, backend: str | None, reason: str) -> str:
    """The backend of a product of x, (tokens, hidden), that does more: the reference where its tokens are few, or where
    `cuda` can't take its operands for the `reason` given. Raises ValueError where that was forced."""
    chosen = choose(op, x, backend)
    if chosen != "cuda":
        return chosen
    if reason and backend == "cuda":
        raise ValueError(f"backend: {op} can't run on 'cuda' here: {reason}")
    return "reference" if reason or (backend is None and len(x) < _MIN_TOKENS) else chosen
