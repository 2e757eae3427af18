"""The same weights and batches in every process: from a seed, made on the device, nothing on the disk.

Some shapes have a stable embedding (Open-Llama's LayerNorm after the embedding), which HuggingFace's Llama has not. So that both
compute the same function at the first step, rows of that table are drawn standardised, and the norm's weight is what
undoes it: it changes nothing, to the rounding. A peer without it has the same losses, and one LayerNorm's work less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from benchmarks.training.work import SEED, Work
from openllama import hf, pretrained
from openllama.config import ModelConfig
from openllama.data.loader import Batch
from openllama.model import Llama


def without_stable_embedding(config: ModelConfig) -> ModelConfig:
    """The shape that HuggingFace's Llama can have: tied where ours is."""
    return dataclasses.replace(config, stable_embedding=False)


def seeded(config: ModelConfig, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of our model by name, fp32, one at a time. The same in each process on the same device."""
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.device("meta"):
        model = Llama(config)
    for name, parameter in model.named_parameters():  # a tied head once
        values = torch.ones(parameter.shape, device=device)
        if parameter.dim() >= 2:
            values.normal_(0, config.init_std, generator=generator)
        if config.stable_embedding and name == "embed.weight":
            standard = values - values.mean(1, keepdim=True)
            values = standard * (config.init_std / standard.square().mean(1, keepdim=True).sqrt())
        if name == "embed_norm.weight":
            values *= math.sqrt(config.init_std**2 + config.norm_eps)
        if name == "embed_norm.bias":
            values.zero_()
        yield name, values


@torch.no_grad()
def our_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Llama:
    model = pretrained.empty_model(config, dtype, device)
    own = dict(model.named_parameters())
    for name, values in seeded(config, device):
        own[name].copy_(values)
    return model


@torch.no_grad()
def fill_theirs(model: torch.nn.Module, config: ModelConfig, device: torch.device) -> None:
    """Puts the same weights into HuggingFace's model of this shape."""
    theirs, parts = dict(model.named_parameters()), {}
    for part in hf.layout(without_stable_embedding(config)):
        parts.setdefault(part.ours, []).append(part)
    for name, values in seeded(config, device):
        for part in parts.get(name, ()):
            theirs[part.name].copy_(values[part.start : part.stop])


def synthetic_batches(vocab: int, batch: int, seq: int, count: int, seed: int = SEED) -> list[Batch]:
    """Batches of `batch` documents of random tokens, each `seq` long; pinned where there is a GPU."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (count, batch * seq + 1), generator=generator)
    positions = torch.arange(seq, dtype=torch.int32).repeat(batch)
    borders = torch.arange(0, batch * seq + 1, seq, dtype=torch.int32)

    def pinned(t: torch.Tensor) -> torch.Tensor:
        return t.pin_memory() if torch.cuda.is_available() else t

    positions, borders = pinned(positions), pinned(borders)
    return [
        Batch(pinned(row[:-1].clone()), pinned(row[1:].clone()), positions, borders, seq, batch * seq)
        for row in ids
    ]


def steps_of(work: Work, config: ModelConfig, count: int) -> list[list[Batch]]:
    """The micro-batches of `count` optimizer steps."""
    each = work.accumulation
    batches = synthetic_batches(config.vocab_size, work.batch, work.seq, count * each)
    return [batches[i : i + each] for i in range(0, len(batches), each)]
