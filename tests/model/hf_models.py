"""Small random models of transformers, of every kind that `openllama.hf.patch` meets."""

import copy

import torch
import transformers

from openllama.hf import patch

from .models import LLAMA3, YARN

ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3")
SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(scaling):
    return {"rope_parameters": scaling | {"rope_theta": 500.0}}


# Each with the number of halves of a layer that run as a block.
KINDS = {
    "llama": ("Llama", {}, 2),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 4, "head_dim": 12, "tie_word_embeddings": True}, 2),
    "llama-eager": ("Llama", {"attn_implementation": "eager"}, 2),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, 0),
    "llama-gelu": ("Llama", {"hidden_act": "gelu"}, 1),
    "llama3-rope": ("Llama", _rope(LLAMA3), 2),
    "yarn-rope": ("Llama", _rope(YARN), 2),
    "dynamic-rope": (
        "Llama",
        _rope({"rope_type": "dynamic", "factor": 2.0}) | {"max_position_embeddings": 16},
        2,
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 1}, 2),
    "mistral-window": ("Mistral", {"sliding_window": 8}, 0),
    "qwen2": ("Qwen2", {}, 2),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        None,
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}, 1),
}


def make(kind="llama", dtype=torch.float32, seed=0, **options):
    """A model in training mode whose every weight is random, norms and biases too."""
    prefix, changes, _ = KINDS[kind]
    changes = changes | options
    implementation = changes.pop("attn_implementation", "sdpa")
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | {"num_key_value_heads": 2} | changes))
    config._attn_implementation = implementation
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2 if parameter.dim() == 1 else 0.1)
    return model.to(dtype).train()


def pair(kind="llama", dtype=torch.float32, options=None, **changes):
    """(theirs, a patched copy of it)."""
    theirs = make(kind, dtype, **changes)
    return theirs, patch(copy.deepcopy(theirs), **(options or {}))


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(ours, other):
    """The norm of the difference, as a share of the other's."""
    ours, other = ours.detach().double(), other.detach().double()
    return float((ours - other).norm() / other.norm().clamp_min(1e-30))


def check_same(theirs, ours, tolerance=1e-5, **inputs):
    """One loss and the same gradients of the same parameters."""
    loss, gradients = loss_and_gradients(theirs, **inputs)
    got_loss, got = loss_and_gradients(ours, **inputs)
    assert abs(got_loss - loss) <= tolerance * abs(loss)
    assert got.keys() == gradients.keys()
    worst = max((error(got[name], gradients[name]), name) for name in gradients)
    assert worst[0] <= tolerance, worst
