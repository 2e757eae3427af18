"""Small models of every kind that the bridge and the sampler meet."""

import torch

from openllama.config import ModelConfig
from openllama.model import Llama

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0}
BASE = {"vocab_size": 101, "hidden": 48, "intermediate": 88, "layers": 2, "heads": 4, "max_positions": 128}
KINDS = {
    "mha": {},
    "gqa": {"kv_heads": 2},
    "mqa-tied": {"kv_heads": 1, "tied": True},
    "stable-tied": {"stable_embedding": True, "tied": True},
    "stable-untied": {"stable_embedding": True, "kv_heads": 2},
    "llama3-rope": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn-rope": {"rope_scaling": YARN, "rope_theta": 500.0},
    "head-dim": {"head_dim": 20, "kv_heads": 2, "norm_eps": 1e-5},
}


def make(dtype=torch.float32, seed=0, **options):
    """A model whose every weight is random, norms and biases too, so that none is left out unseen."""
    model = Llama(ModelConfig(**(BASE | options))).initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2 if p.dim() == 1 else 0.1)
    return model.to(dtype)


@torch.no_grad()
def last_logits(model, contexts):
    """Logits after each context, (contexts, vocab), from a dense forward of each: no pack, no cache."""
    return torch.stack(
        [model(torch.tensor([context], device=model.embed.weight.device))[0, -1] for context in contexts]
    )
