"""The angles of rotary embedding: tables of cos and sin by position, and the scalings that stretch a context.

The formulas and sources are those of the functions; what turns by these tables is rotary.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import checks

#: The kinds of rotary scaling that we build (HuggingFace's names), and the numbers that each takes.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}

#: What a kind may be given besides.
ROPE_OPTIONS = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}

_BETA_FAST, _BETA_SLOW = 32, 1  # YaRN's, for Llama


def rotary_tables(
    head_dim: int,
    max_positions: int,
    theta: float = 10000.0,
    scaling: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (max_positions, head_dim / 2), fp32: bf16 could not tell position 257 from 258.

    For a head that turns in part, give the number of elements that turn as head_dim.
    `scaling` is HuggingFace's dictionary: `rope_type` `linear`, `llama3` or `yarn` (with its factors), None for none. Of
    yarn (Peng et al., "YaRN", 2023) cos and sin are both multiplied by the attention factor, so that scores are by its
    square. Computed in fp32 in HuggingFace's order of operations, so that checkpoints trained there see the same angles.
    Raises ValueError for an odd head_dim, a theta not above 0 (yarn: 1), an unknown or incomplete scaling.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: got {head_dim}, takes an even number of at least 2")
    if max_positions < 0:
        raise ValueError(f"max_positions: got {max_positions}, takes a whole number of at least 0")
    checks.in_range("theta", theta, 1e-37, 3e38, "a finite number above 0")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    if scaling is not None:
        check_rope_scaling(scaling, "scaling")
    kind = "default" if scaling is None else scaling["rope_type"]
    factor = 1.0
    if scaling is not None and kind == "yarn":
        frequencies, factor = _yarn(theta**exponent, theta, scaling)
    else:
        frequencies = _slowed(1.0 / theta**exponent, kind, scaling or {})
    angles = torch.arange(max_positions, device=device).float()[:, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


def check_rope_scaling(scaling: dict[str, Any], where: str) -> None:
    """Raises ValueError naming `where`, the key, what it got and what it takes."""
    kind = scaling.get("rope_type")
    if kind not in ROPE_KEYS:
        raise ValueError(f"{where}: got rope_type {kind!r}, takes one of {', '.join(ROPE_KEYS)}")
    takes, options = ROPE_KEYS[kind], ROPE_OPTIONS.get(kind, ())
    for key in (*takes, *(k for k in options if scaling.get(k) is not None)):
        value = scaling.get(key)
        if key == "truncate":
            fits, meaning = isinstance(value, bool), "True or False"
        elif key.startswith("mscale"):
            fits, meaning = (
                _is_number(value) and 0 <= value < math.inf,
                "a number of at least 0 (0: not used)",
            )
        else:
            fits, meaning = _is_number(value) and 0 < value < math.inf, "a number above 0"
        if not fits:
            raise ValueError(f"{where}: {key}: got {value!r}, takes {meaning} for {kind!r}")
    for key in scaling.keys() - {"rope_type", *takes, *options}:
        known = ", ".join((*takes, *options)) or "nothing more"
        raise ValueError(f"{where}: {key}: unknown for {kind!r}, takes {known}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(
            f"{where}: high_freq_factor: got {scaling['high_freq_factor']}, takes more than low_freq_factor="
            f"{scaling['low_freq_factor']}"
        )
    fast, slow = scaling.get("beta_fast") or _BETA_FAST, scaling.get("beta_slow") or _BETA_SLOW
    if kind == "yarn" and fast < slow:
        raise ValueError(f"{where}: beta_fast: got {fast}, takes at least beta_slow={slow}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _slowed(frequencies: torch.Tensor, kind: str, scaling: dict[str, Any]) -> torch.Tensor:
    """Angles a position after `linear` or `llama3` scaling, (head_dim / 2)."""
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    # Meta's rule for Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, a smooth blend between.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling["factor"] + blend * frequencies


def _yarn(periods: torch.Tensor, theta: float, scaling: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Angles a position, (head_dim / 2), and the attention factor. `periods`: positions a radian, before scaling.

    Pairs that turn more than beta_fast times over the original context are kept, those that turn less than beta_slow
    times slowed by `factor`, with a ramp over the pairs between.
    """
    checks.in_range("theta", theta, 1 + 1e-6, 3e38, "a finite number above 1 for 'yarn'")
    dim, factor = 2 * len(periods), scaling["factor"]

    def pair_of(turns: float) -> float:
        """The index, no whole number, of the pair that turns so many times over the original context."""
        context = scaling["original_max_position_embeddings"]
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (
        pair_of(scaling.get(key) or default)
        for key, default in (("beta_fast", _BETA_FAST), ("beta_slow", _BETA_SLOW))
    )
    if scaling.get("truncate") in (None, True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # of the ramp; HuggingFace's way around a division by 0
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=periods.device) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    frequencies = 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept
    return frequencies, _attention_factor(scaling)


def _attention_factor(scaling: dict[str, Any]) -> float:
    """YaRN's 0.1 ln(factor) + 1, or DeepSeek's quotient of two of them where it has both mscales."""

    def of(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)
