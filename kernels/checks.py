"""Checks of arguments: each names the argument, what it got and what it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_tensor(name: str, t: torch.Tensor) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, takes a tensor")


def is_float(name: str, t: torch.Tensor) -> None:
    is_tensor(name, t)
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: got {t.dtype}, takes float32, bfloat16, float16 or float64")


def is_integer(name: str, t: torch.Tensor) -> None:
    is_tensor(name, t)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {t.dtype}, takes int32 or int64")


def has_shape(name: str, t: torch.Tensor, shape: Sequence[int], meaning: str) -> None:
    is_tensor(name, t)
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, takes {tuple(shape)} ({meaning})")


def same_dtype(name: str, t: torch.Tensor, dtype: torch.dtype, partner: str) -> None:
    is_tensor(name, t)
    if t.dtype != dtype:
        raise TypeError(f"{name}: got {t.dtype}, takes {partner}'s {dtype}")


def same_device(name: str, t: torch.Tensor, device: torch.device, partner: str) -> None:
    is_tensor(name, t)
    if t.device != device:
        raise ValueError(f"{name}: got a tensor on {t.device}, takes {partner}'s {device}")


def in_range(name: str, value: float, low: float, high: float, meaning: str) -> None:
    """low <= value <= high, which no NaN is. (Not math.isfinite: Dynamo can't trace it for a number that varies.)"""
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}: got {value!r}, takes {meaning}")


def rows(t: torch.Tensor, columns: int) -> torch.Tensor:
    """`t` as (rows, columns) with contiguous rows: a view where that is possible, else a copy."""
    flat = t.reshape(-1, columns) if columns else t.reshape(0, 0)
    # clone, because contiguous() gives an empty tensor back with the strides it has
    return flat if columns <= 1 or flat.stride(-1) == 1 else flat.clone(memory_format=torch.contiguous_format)


def linear(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """The shapes of `weights`, of what is to be linear layers of x, (tokens, hidden)."""
    is_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes (tokens, hidden)")
    for i, weight in enumerate(weights):
        same_dtype(f"weights[{i}]", weight, x.dtype, "x")
        same_device(f"weights[{i}]", weight, x.device, "x")
    return [tuple(weight.shape) for weight in weights]


def tma_reads(t: torch.Tensor) -> bool:
    """Whether Hopper's copy unit can read the 16-bit matrix `t` as it lies."""
    if not t.numel() or t.stride(1) != 1 or t.shape[1] % 8 or t.stride(0) % 8 or t.stride(0) < t.shape[1]:
        return False
    return torch.compiler.is_compiling() or t.data_ptr() % 16 == 0
