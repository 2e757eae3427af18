"""The cache on a GPU: the same logits as without one."""

import pytest
import torch

from openllama.decoder import Decoder

from .models import last_logits, make


@pytest.mark.gpu
@torch.no_grad()
def test_logits_on_a_gpu_equal_those_without_a_cache():
    model = make(kv_heads=2, stable_embedding=True).to("cuda")
    rows = [[1], list(range(40)), [5, 6, 7]]
    decoder = Decoder(model, rows, 20)
    for step in range(20):
        expected = last_logits(model, rows)
        assert (decoder.logits() - expected).abs().max() <= 1e-4 * expected.abs().max()
        for i in range(3):
            rows[i].append(step)
            decoder.append(i, step)
