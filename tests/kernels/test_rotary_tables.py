"""rotary_tables: cos and sin are those of transformers, for every scaling."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from openllama.ops import rotary_tables

from .contract import F32, F64

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("scaling", (None, {"rope_type": "linear", "factor": 4.0}, LLAMA3))
@pytest.mark.parametrize("theta", (10_000.0, 500_000.0))
def test_tables_are_huggingfaces(scaling, theta):
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131_072)
    config.rope_parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    if scaling is None:
        frequencies = 1.0 / theta ** (torch.arange(0, 128, 2).float() / 128)
    else:
        frequencies, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    angles = torch.arange(10_000).float()[:, None] * frequencies
    cos, sin = rotary_tables(128, 10_000, theta, scaling)
    assert cos.dtype == sin.dtype == F32 and cos.shape == (10_000, 64)
    # an ulp of a frequency is up to 10,000 * 6e-8 of an angle
    assert (cos - angles.cos()).abs().max() < 2e-3 and (sin - angles.sin()).abs().max() < 2e-3
    assert torch.equal(cos[:2], angles.cos()[:2]) or scaling is LLAMA3


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
        {"mscale": 1.0},
        {"mscale": 1.0, "mscale_all_dim": 0},
        {"attention_factor": 1.5, "truncate": False},
        {"beta_fast": 8.0, "beta_slow": 2},
        {"factor": 0.5},
        {"beta_fast": 3, "beta_slow": 3, "truncate": True},
        {"original_max_position_embeddings": 16},
    ),
)
@pytest.mark.parametrize("head_dim, theta", ((128, 10_000.0), (64, 500_000.0), (6, 5.0)))
def test_yarn_tables_are_huggingfaces(options, head_dim, theta):
    scaling = YARN | options
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=8192)
    config.rope_parameters = {"rope_theta": theta, **scaling}
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    angles = torch.arange(3000).float()[:, None] * frequencies
    cos, sin = rotary_tables(head_dim, 3000, theta, scaling)
    assert torch.equal(cos, angles.cos() * factor) and torch.equal(sin, angles.sin() * factor)


def test_tables_of_a_part_of_the_head_are_huggingfaces():
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=8192)
    config.rope_parameters = {"rope_theta": 1e4, "partial_rotary_factor": 0.25, **YARN}
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert torch.equal(rotary_tables(32, 2, 1e4, YARN)[0][1], frequencies.cos() * factor)


def test_tables_tell_far_positions_apart():
    """In bf16 position 257 equals 256."""
    cos, sin = rotary_tables(128, 100_001)
    exact = torch.tensor(100_000.0, dtype=F64)
    assert abs(cos[-1, 0] - exact.cos()) < 1e-6 and abs(sin[-1, 0] - exact.sin()) < 1e-6
    assert (cos.diff(dim=0).abs() + sin.diff(dim=0).abs())[:, 0].min() > 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((8, 8, 1e4, {"rope_type": "longrope"}), "scaling: got rope_type 'longrope', takes one of default, linear"),
        ((8, 8, 1e4, {"type": "linear", "factor": 4.0}), "scaling: got rope_type None"),
        ((8, 8, 1e4, {"rope_type": "linear"}), "scaling: factor: got None, takes a number above 0"),
        ((8, 8, 1e4, YARN | {"factor": "4"}), "scaling: factor: got '4', takes a number above 0 for 'yarn'"),
        ((8, 8, 1.0, YARN), "theta: got 1.0, takes a finite number above 1 for 'yarn'"),
        ((7, 8), "head_dim: got 7, takes an even number"),
        ((8, 8, float("nan")), "theta: got nan"),
        ((8, 8, -5.0), "theta: got -5.0, takes a finite number above 0"),
    ],
)  # fmt: skip
def test_bad_tables_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        rotary_tables(*arguments)
