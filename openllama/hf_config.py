"""HuggingFace's config.json of a Llama, to and from our ModelConfig. What we don't build is an error, by name."""

from __future__ import annotations

from typing import Any

import torch

from openllama import __version__
from openllama.config import ModelConfig, from_dict
from openllama.kernels.rotary_tables import ROPE_KEYS, ROPE_OPTIONS, check_rope_scaling

FOLDED = "stable_embedding_folded"  # in config.json: embed_tokens holds an embedding's norm too, for good
MARK = "openllama_version"  # in config.json: this folder is an export of ours, which a newer one may replace

# HuggingFace's names and ours, of what every model must say.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}
# What we don't build, by the values that stand for its absence.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "pretraining_tp": (None, 0, 1),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
}


def config_to_hf(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """HuggingFace's config.json of this shape. Rotary settings are there in both forms, before and since transformers 5."""
    c = config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(c, ours) for theirs, ours in _SIZES.items()},
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "initializer_range": c.init_std,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling and dict(c.rope_scaling),  # transformers writes into it
        "rope_parameters": {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tied and not c.stable_embedding,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        MARK: __version__,
        **({FOLDED: True} if c.stable_embedding else {}),
    }


def config_from_hf(values: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """Our config from HuggingFace's dictionary. Raises ValueError naming `source` and whatever we don't build."""
    kind, architectures = values.get("model_type"), values.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or architectures != ["LlamaForCausalLM"]:
        raise ValueError(
            f"{source}: got model_type {kind!r}, architectures {architectures}, takes 'llama', ['LlamaForCausalLM']"
        )
    for key, absent in _ABSENT.items():
        if values.get(key) not in absent:
            raise ValueError(
                f"{source}: {key}: got {values[key]!r}, takes {absent[-1]!r}: nothing else is supported"
            )
    for key in _SIZES:
        if type(values.get(key)) is not int:
            raise ValueError(f"{source}: {key}: got {values.get(key)!r}, takes a whole number")
    max_positions = values.get("max_position_embeddings") or 2048
    theta, scaling = _rope_from_hf(values, max_positions, source)
    ours = {
        **{ours: values[theirs] for theirs, ours in _SIZES.items()},
        "kv_heads": values.get("num_key_value_heads") or 0,
        "head_dim": values.get("head_dim") or 0,
        "max_positions": max_positions,
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied": values.get("tie_word_embeddings", False),
        "init_std": values.get("initializer_range", 0.02),
    }
    return from_dict(ModelConfig, ours, source)


def _rope_from_hf(
    values: dict[str, Any], max_positions: int, source: str
) -> tuple[float, dict[str, Any] | None]:
    """theta and our rope_scaling, from `rope_scaling` + `rope_theta` (transformers 4) or `rope_parameters` (5)."""
    where = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = {k: v for k, v in (values.get(where) or {}).items() if v is not None}
    theta = given.pop("rope_theta", values.get("rope_theta") or 10000.0)
    legacy = given.pop("type", None)
    kind = given.pop("rope_type", legacy or "default")
    if given.pop("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{source}: {where}: got a partial_rotary_factor, takes rotary over the whole head")
    if kind in ("llama3", "yarn"):  # as transformers does, where what stands outside wins
        outside = values.get("original_max_position_embeddings")
        inside = given.get("original_max_position_embeddings", max_positions)
        given["original_max_position_embeddings"] = outside or inside
    options = (k for k in ROPE_OPTIONS.get(kind, ()) if k in given)
    scaling = {"rope_type": kind, **{k: given.get(k) for k in (*ROPE_KEYS.get(kind, ()), *options)}}
    check_rope_scaling(scaling, f"{source}: {where}")
    # What the type doesn't use is left out (transformers ignores it with a warning), but not what would change it.
    for key in given.keys() - scaling.keys():
        if isinstance(given[key], dict):
            raise ValueError(f"{source}: {where}: got {key}, takes one setting for all layers")
    return theta, None if kind == "default" else scaling
