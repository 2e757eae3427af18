"""Checkpoints of optimizers and models that are not the plain case."""

import pytest
import torch

from openllama.config import ModelConfig
from openllama.model import Llama
from openllama.optim import AdamW
from openllama.training import checkpoint

SHAPE = ModelConfig(vocab_size=64, hidden=32, intermediate=48, layers=2, heads=4, max_positions=16)


def made(dtype=torch.float32, freeze="", **options):
    """A model, and an optimizer of those of its parameters that are not frozen, after two steps."""
    model = Llama(SHAPE).initialise(0).to(dtype)
    for name, p in model.named_parameters():
        p.requires_grad_(not freeze or not name.startswith(freeze))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], **options)
    for seed in range(2):
        ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(seed))
        model(ids, labels=ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saved(tmp_path, model, optimizer):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"pieces")
    checkpoint.save(tmp_path / "all", 2, model, optimizer, {}, tokenizer, [checkpoint.random_state()])
    return checkpoint.step_folder(tmp_path / "all", 2)


@pytest.mark.parametrize(
    "options",
    (
        {"capturable": True},
        {"freeze": "embed"},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16, "masters": "none", "moments": "bf16"},
    ),
    ids=str,
)
def test_save_and_load(tmp_path, options):
    model, optimizer = made(**options)
    place = saved(tmp_path, model, optimizer)
    other, loaded = made(**options)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    checkpoint.load(place, other, loaded)
    ids = torch.arange(8)[None]
    for net, step in ((model, optimizer), (other, loaded)):
        net(ids, labels=ids).backward()
        step.step()
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
        assert optimizer.state.get(a, {}).keys() == loaded.state.get(b, {}).keys()


def test_a_parameter_without_a_step_so_far_has_no_state(tmp_path):
    model, optimizer = made()
    fresh = AdamW(model.parameters())
    place = saved(tmp_path, model, fresh)
    assert not fresh.state, "saving must not put entries there"
    checkpoint.load(place, model, optimizer)
    assert not optimizer.state


def test_weights_of_another_dtype_are_refused(tmp_path):
    """Their optimizers' states look the same."""
    place = saved(tmp_path, *made())
    model, optimizer = made(torch.bfloat16, masters="none")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"got torch.float32, takes torch.bfloat16; resume with the dtype"):
        checkpoint.load(place, model, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_a_model_used_in_inference_mode_can_be_trained():
    model = Llama(SHAPE).initialise(0)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).backward()
    assert model.embed.weight.grad is not None
