"""cross_entropy, forward and backward, beside F.cross_entropy of the logits in fp32, Liger and quack.

On a GPU ours, Liger and quack write the gradient over the logits in the forward's one pass.
"""

from functools import partial

import pytest
import torch

from benchmarks.ops.implementations import ours
from benchmarks.ops.timing import DEVICE, random
from benchmarks.peers import eager, liger, quack
from openllama.ops import cross_entropy

SHAPES = (
    (8192, 32_000), (16_384, 32_000), (8192, 50_257), (4096, 100_000), (4096, 128_256), (4096, 151_936), (2048, 256_000),
)  # fmt: skip


@pytest.mark.parametrize("tokens, vocab", ((2048, 4096), (512, 32_000)))
def test_cross_entropy(versus, device, dtype, tokens, vocab):
    logits = torch.randn(tokens, vocab, device=device).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=device)

    def step(function):
        return lambda: torch.autograd.grad(function(logits, labels), logits)

    shape = {"tokens": tokens, "vocab": vocab, "dtype": str(dtype)[6:]}
    moved = 3 * logits.numel() * logits.element_size()  # logits twice, dlogits
    versus(
        "cross_entropy_fwd_bwd",
        shape,
        moved,
        {"ours": step(cross_entropy), "eager": step(eager.cross_entropy)},
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, vocab", SHAPES)
def test_inplace(race, tokens, vocab):
    kept, labels = random(tokens, vocab), torch.randint(vocab, (tokens,), device=DEVICE)
    logits = kept.clone()
    loss = partial(eager.cross_entropy, labels=labels)
    builders = {
        **ours(lambda ops: ops.cross_entropy_fwd_bwd_(logits, labels, None, -100, 0.0, 0.0)),
        "eager": partial(eager.both, loss, logits),
        "compile": partial(eager.both_compiled, loss, logits),
        "liger": partial(liger.cross_entropy, logits, labels),
        "quack": partial(quack.cross_entropy, logits, labels),
    }
    shape, restore = {"tokens": tokens, "vocab": vocab}, partial(logits.copy_, kept)
    race("cross_entropy_fwd_bwd", shape, builders, moved=2 * logits.nbytes, prepare=restore)
