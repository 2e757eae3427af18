"""Loads the native library (`_C.abi3.so`, built by setup.py) and tells what it holds."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

PATH = Path(__file__).resolve().parent / "_C.abi3.so"

CPU_LEVELS = ("base", "avx2", "avx512")
if os.environ.get("OPENLLAMA_CPU", "avx512") not in CPU_LEVELS:
    raise ValueError(
        f"OPENLLAMA_CPU: got {os.environ['OPENLLAMA_CPU']!r}, takes one of {', '.join(CPU_LEVELS)}"
    )

#: Why the native library is not in use; empty when it is.
missing = ""
if not PATH.exists():
    missing = f"{PATH} is not built (pip install --no-build-isolation -e .)"
else:
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        missing = f"{PATH} does not load: {error}"
if missing:
    warnings.warn(
        f"openllama: {missing}; every op runs on its PyTorch reference", RuntimeWarning, stacklevel=2
    )


@functools.cache
def build_info() -> dict[str, Any]:
    """What the library was built with and found here: cpu (instruction set), cuda (runtime version), arches."""
    return {} if missing else json.loads(torch.ops.openllama.build_info())


def driver_version() -> int:
    """The CUDA that the driver here takes, 1000 major + 10 minor; 0: no driver. Starts the driver: not for import."""
    return 0 if missing else torch.ops.openllama.driver_version()


#: Whether the library holds CUDA kernels.
has_cuda: bool = bool(build_info().get("cuda"))


def fake(op: str) -> Callable[[F], F]:
    """Registers the shape function of a raw op, for torch.compile; does nothing where the library is missing."""
    return (lambda function: function) if missing else torch.library.register_fake(f"openllama::{op}")
