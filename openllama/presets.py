"""Model shapes by name. 7b to 65b are Open-Llama's: vocabulary 100,000, stable and tied embedding, LLaMA's sizes."""

from __future__ import annotations

from openllama.config import ModelConfig, nearest

_OPEN_LLAMA = {"vocab_size": 100_000, "max_positions": 2048, "tied": True, "stable_embedding": True}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

PRESETS: dict[str, ModelConfig] = {
    # Learns Python on two CPU cores in three minutes (the quickstart): of 1.3, 2.4 and 4.0 M parameters, the smallest
    # came furthest in that time, since it saw the most tokens.
    "tiny": ModelConfig(
        vocab_size=4096, hidden=128, intermediate=384, layers=4, heads=2, kv_heads=1, max_positions=1024,
        tied=True, stable_embedding=True, init_std=0.02,
    ),
    "125m": ModelConfig(
        vocab_size=32_000, hidden=768, intermediate=2560, layers=12, heads=12, tied=True, stable_embedding=True,
    ),
    # Llama-3.2-1B
    "1b": ModelConfig(
        vocab_size=128_256, hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, max_positions=131_072,
        norm_eps=1e-5, rope_theta=500_000.0, rope_scaling=_LLAMA3_SCALING, tied=True, init_std=0.02,
    ),
    "7b": ModelConfig(hidden=4096, intermediate=11_008, layers=32, heads=32, **_OPEN_LLAMA),
    "13b": ModelConfig(hidden=5120, intermediate=13_824, layers=40, heads=40, **_OPEN_LLAMA),
    "33b": ModelConfig(hidden=6656, intermediate=17_920, layers=60, heads=52, **_OPEN_LLAMA),
    "65b": ModelConfig(hidden=8192, intermediate=22_016, layers=80, heads=64, **_OPEN_LLAMA),
    # Meta-Llama-3-8B
    "llama3-8b": ModelConfig(
        vocab_size=128_256, hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8, max_positions=8192,
        norm_eps=1e-5, rope_theta=500_000.0, init_std=0.02,
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The shape called `name`. Raises ValueError naming the nearest one."""
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]
