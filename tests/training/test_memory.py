"""What a step is thought to hold, and what backward makes again because of it."""

import pytest
import torch

from openllama.model import Llama
from openllama.optim import AdamW
from openllama.presets import preset
from openllama.training import memory

CPU = torch.device("cpu")


def test_activations_follow_the_blocks_table():
    """Bytes a token and layer of the 7b, see openllama/block.py; one layer more is at work."""
    config = preset("7b")
    one = {
        r: memory.activation_bytes(config, 1, torch.bfloat16, r) / 1e3
        for r in ("none", "norm", "mlp", "full")
    }
    assert {r: round((b - 131.584) / 32) for r, b in one.items()} == {
        "none": 132,
        "norm": 93,
        "mlp": 49,
        "full": 16,
    }
    with pytest.raises(ValueError, match="recompute: got 'some'"):
        memory.activation_bytes(config, 1, torch.bfloat16, "some")


@pytest.mark.parametrize(
    "tokens, gib, recompute",
    [  # 18 bytes a parameter, the weights' 2 of them there: 103 GiB; 1 GiB in reserve; 131.6 KB a token and layer or less
        (2048, 132, "none"),
        (2048, 110.5, "norm"),
        (2048, 107.5, "mlp"),
        (2048, 105, "full"),
        (2048, 50, "full"),  # nothing fits: the least
        (8192, 132, "norm"),
    ],
)
def test_what_is_made_again_is_no_more_than_has_to(tokens, gib, recompute, monkeypatch):
    monkeypatch.setattr(memory, "usable_bytes", lambda device: gib * 2**30)
    with torch.device("meta"):
        model = Llama(preset("7b")).to(torch.bfloat16)
    assert memory.choose_recompute(model, AdamW(model.parameters()), tokens) == recompute


def test_usable_memory():
    assert 2**20 < memory.usable_bytes(CPU) < 2**50


@pytest.mark.gpu
def test_memory_that_torch_keeps_is_free():
    device = torch.device("cuda")
    before = memory.usable_bytes(device)
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert before - memory.usable_bytes(device) >= 0.9 * 2**28
    del held
    assert memory.usable_bytes(device) >= before - 2**20  # in torch's cache, not the driver's
