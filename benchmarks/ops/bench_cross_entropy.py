"""cross_entropy, forward and backward, beside F.cross_entropy of the logits in fp32, as transformers' loss takes it."""

import pytest
import torch
import torch.nn.functional as F

from openllama.ops import cross_entropy


def eager(logits, labels):
    return F.cross_entropy(logits.float(), labels)


@pytest.mark.parametrize("tokens, vocab", ((2048, 4096), (512, 32_000)))
def test_cross_entropy(versus, device, dtype, tokens, vocab):
    logits = torch.randn(tokens, vocab, device=device).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=device)

    def step(function):
        return lambda: torch.autograd.grad(function(logits, labels), logits)

    shape = {"tokens": tokens, "vocab": vocab, "dtype": str(dtype)[6:]}
    moved = 3 * logits.numel() * logits.element_size()  # logits twice, dlogits
    versus("cross_entropy_fwd_bwd", shape, moved, {"ours": step(cross_entropy), "eager": step(eager)})
