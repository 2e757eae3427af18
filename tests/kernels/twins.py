"""What the tests of the Triton twins share. They run in Triton's interpreter on the CPU, in a process of its
own, as triton chooses when it is imported; and compiled, on a GPU (`pytest -m gpu`)."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import openllama.ops  # noqa: F401 (registers the raw ops)

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

#: Marks the tests of a class.
kernels = (lambda tests: tests) if INTERPRETED else pytest.mark.gpu
only_compiled = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


def run_interpreted(file: str) -> None:
    """The tests of `file` in the interpreter."""
    if INTERPRETED:
        pytest.skip("is that process")
    numpy = importlib.import_module("numpy")
    if _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 can't loop under NumPy 2.4")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "--disable-warnings", file],
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def _version(module: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def twin(name: str) -> ModuleType:
    return importlib.import_module(f"openllama.kernels.triton.{name}")


def on(*values: object) -> list:
    """On the tests' device, tensors with all that their memory holds."""
    return [_moved(v) if isinstance(v, torch.Tensor) and DEVICE != "cpu" else v for v in values]


def _moved(t: torch.Tensor) -> torch.Tensor:
    """`to` would lay a slice out anew."""
    memory = t.untyped_storage().cuda()
    return torch.empty(0, dtype=t.dtype, device=DEVICE).set_(memory, t.storage_offset(), t.shape, t.stride())


if INTERPRETED:
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _round(values, source, target, rounding):
        """fp32 to bf16: the interpreter cuts off, and a GPU rounds."""
        if (source, target) != (triton.language.float32, triton.language.bfloat16):
            return _convert(values, source, target, rounding)
        return torch.tensor(values).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = _round

    # It patches triton.language anew for each call of a device function, which takes half of its time: once a launch,
    # in whole, does.
    _patch, _language = interpreter._patch_lang, triton.language
    _in_whole = SimpleNamespace(__globals__={"tl": _language, "core": _language.core})
    interpreter._patch_lang = lambda function: _patch(_in_whole)
    interpreter.InterpretedFunction.__call__ = lambda self, *values, **options: self.rewrite()(
        *values, **options
    )
