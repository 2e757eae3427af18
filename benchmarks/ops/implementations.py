"""Ours as a race takes it: the raw op on each backend that has it on a GPU, without autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.ops.timing import Builder, Step
from openllama.kernels import library

BACKENDS = ("cuda", "triton")


def ours(call: Callable[[Any], object]) -> dict[str, Builder]:
    """`call(ops)` on the raw ops of each backend."""
    return {f"ours:{backend}": partial(_build, call, backend) for backend in BACKENDS}


def _build(call: Callable[[Any], object], backend: str) -> Step:
    return partial(call, library.ops(backend))
