"""A model's config as HuggingFace writes it, and back."""

import copy
import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from openllama import hf
from openllama.config import ModelConfig
from openllama.hf import config_from_hf

from .models import BASE, LLAMA3, YARN


def hf_config(**changes):
    config = hf.config_to_hf(ModelConfig(**BASE), torch.float32)
    return config | changes


def test_config_reads_both_forms_of_rope():
    plain = hf_config()
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        del plain[key]
    assert config_from_hf(plain).rope_theta == 10000.0
    old = config_from_hf(plain | {"rope_theta": 500.0, "rope_scaling": LLAMA3})
    legacy = {"type" if k == "rope_type" else k: v for k, v in LLAMA3.items()}
    assert config_from_hf(plain | {"rope_theta": 500.0, "rope_scaling": legacy}) == old
    assert config_from_hf(plain | {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}}) == old
    assert (old.rope_theta, old.rope_scaling) == (500.0, LLAMA3)
    default = config_from_hf(plain | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert (default.rope_theta, default.rope_scaling) == (7.0, None)


def test_original_context_of_a_scaling():
    """Where transformers looks for it: beside rope_scaling, in it, else it is the model's."""
    plain = hf_config(max_position_embeddings=128, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    scaled = plain | {"rope_scaling": YARN}
    for values, expected in (
        (plain, 128),
        (scaled, 32),
        (scaled | {"original_max_position_embeddings": 64}, 64),
    ):
        scaling = config_from_hf(values).rope_scaling
        assert scaling is not None and scaling["original_max_position_embeddings"] == expected
        config = LlamaConfig(**copy.deepcopy({k: v for k, v in values.items() if k != "rope_parameters"}))
        config.standardize_rope_params()  # as its model does before it makes the tables
        assert config.rope_parameters["original_max_position_embeddings"] == expected


def test_transformers_may_write_into_what_it_is_given():
    """Its config takes rope_theta into the rope_scaling that it is handed."""
    config = ModelConfig(**BASE, rope_scaling=dict(LLAMA3))
    LlamaConfig(**hf.config_to_hf(config, torch.float32)).standardize_rope_params()
    assert config.rope_scaling == LLAMA3


def test_config_is_what_transformers_reads(kind, tmp_path):
    config = ModelConfig(**(BASE | kind))
    (tmp_path / "config.json").write_text(json.dumps(hf.config_to_hf(config, torch.bfloat16)))
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, LlamaConfig) and read.dtype == torch.bfloat16
    assert config_from_hf(read.to_dict() | {"architectures": ["LlamaForCausalLM"]}) == dataclasses.replace(
        config, stable_embedding=False, tied=config.tied and not config.stable_embedding
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["MistralForCausalLM"]}, r"architectures \['MistralForCausalLM'\], takes"),
        ({"model_type": "qwen2"}, "got model_type 'qwen2'"),
        ({"attention_bias": True}, "attention_bias: got True, takes False"),
        ({"mlp_bias": True}, "mlp_bias: got True"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', takes 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp: got 2, takes 1"),
        ({"sliding_window": 4096}, "sliding_window: got 4096, takes None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: got"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "got rope_type 'longrope', takes one of default, linear",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "got rope_type 'dynamic'"),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling: factor: got None, takes a number above 0 for 'linear'",
        ),
        ({"rope_scaling": None, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": None, "rope_parameters": {"full_attention": {}}}, "one setting for all layers"),
        ({"hidden_size": None}, "hidden_size: got None, takes a whole number"),
        ({"vocab_size": "many"}, "vocab_size: got 'many', takes a whole number"),
        ({"num_key_value_heads": 3}, "kv_heads: got 3, takes a divisor of heads=4"),
        ({"rms_norm_eps": "small"}, "config.json: norm_eps: got 'small'"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf_config(**changes))
