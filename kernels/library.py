"""Loads the native library (`_C.abi3.so`, built by setup.py) and tells what it holds."""

from __future__ import annotations

import functools
import importlib
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


@functools.cache
def has_cublaslt() -> bool:
    """Whether torch has loaded cuBLASLt, which `matmul` runs on."""
    return not missing and torch.ops.openllama.has_cublaslt()


#: Whether the library holds CUDA kernels.
has_cuda: bool = bool(build_info().get("cuda"))


def ops(backend: str) -> Any:
    """The namespace whose raw ops run on `backend`: the native library's, or their Triton twins'."""
    return torch.ops.openllama_triton if backend == "triton" else torch.ops.openllama


_twins = torch.library.Library("openllama_triton", "FRAGMENT")


def fake(op: str) -> Callable[[F], F]:
    """Registers the shape function of a raw op, for torch.compile, and the op's Triton twin: the function of the same
    name and schema in triton/<op>.py, imported when it is first called. Does nothing where the library is missing."""

    def register(function: F) -> F:
        schema = str(getattr(torch.ops.openllama, op).default._schema).removeprefix("openllama::")
        _twins.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        module = f"{__package__}.triton.{function.__module__.rpartition('.')[2]}"
        _twins.impl(op, lambda *args: getattr(importlib.import_module(module), op)(*args), "CUDA")
        for namespace in ("openllama", "openllama_triton"):
            torch.library.register_fake(f"{namespace}::{op}")(function)
        return function

    return (lambda function: function) if missing else register
