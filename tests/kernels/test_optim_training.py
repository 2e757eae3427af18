"""A small Llama learns as well with the leanest exact form of AdamW as in fp32."""

import pytest
import torch

from openllama.config import ModelConfig
from openllama.model import Llama
from openllama.optim import AdamW, decay_groups

from .contract import BF16, F32

VOCAB, LR = 64, 3e-3
SHAPE = ModelConfig(vocab_size=VOCAB, hidden=64, intermediate=128, layers=2, heads=2, max_positions=64)


def sequences(count, seed):
    """(count, 33): in 3 of 4 cases a token is the successor of the one before the last, which attention has to find; else
    any. At best 1.66 nats a token."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(VOCAB, (VOCAB,), generator=torch.Generator().manual_seed(99))
    ids = torch.randint(VOCAB, (count, 33), generator=generator)
    random = torch.rand(count, 33, generator=generator) < 0.25
    for i in range(2, 33):
        ids[:, i] = torch.where(random[:, i], ids[:, i], successors[ids[:, i - 2]])
    return ids


def held_out_loss(steps, device, dtype, **form):
    """After `steps` steps of 8 sequences."""
    model = Llama(SHAPE).initialise(1).to(device, dtype)
    for p in model.parameters():
        p.grad_dtype = F32
    optimizer = AdamW(decay_groups(model, 0.1), **form)
    for step, ids in enumerate(sequences(8 * steps, 0).to(device).split(8)):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 50, 1.05 - step / steps)
        (model(ids[:, :-1], labels=ids[:, 1:]) / ids[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        ids = sequences(512, 1).to(device)
        return model(ids[:, :-1], labels=ids[:, 1:]).item() / ids[:, 1:].numel()


def test_the_leanest_exact_form_learns_as_well_as_fp32(device):
    steps = 1000 if device == "cuda" else 240
    fp32 = held_out_loss(steps, device, F32)
    lean = held_out_loss(steps, device, BF16, moments="8bit", masters="remainder")
    assert fp32 < 1.9, "it has learned"
    assert lean == pytest.approx(fp32, rel=0.005)
