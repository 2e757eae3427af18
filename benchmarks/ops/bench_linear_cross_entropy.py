"""linear_cross_entropy (the head and its loss), forward and backward, with what it holds in memory meanwhile."""

from functools import partial

import pytest
import torch

from benchmarks.ops.implementations import BACKENDS
from benchmarks.ops.timing import DEVICE, Step, random
from benchmarks.peers import eager, liger


def ours(h, weight, labels, backend) -> Step:
    """With the weight's gradient in fp32, as training accumulates it, where this torch lets a parameter have that."""
    from openllama.ops import linear_cross_entropy

    h, weight = h.detach().requires_grad_(), torch.nn.Parameter(weight)
    if hasattr(weight, "grad_dtype"):
        weight.grad_dtype = torch.float32

    def step():
        h.grad = weight.grad = None
        linear_cross_entropy(h, weight, labels, backend=backend).backward()

    return step


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, hidden, vocab", ((8192, 4096, 100_000),))
def test_linear_cross_entropy(race, tokens, hidden, vocab):
    h, weight = random(tokens, hidden), random(vocab, hidden) * hidden**-0.5
    labels = torch.randint(vocab, (tokens,), device=DEVICE)
    loss = partial(eager.linear_cross_entropy, labels=labels)
    builders = {
        **{f"ours:{backend}": partial(ours, h, weight, labels, backend) for backend in BACKENDS},
        "eager": partial(eager.both, loss, h, weight),
        "compile": partial(eager.both_compiled, loss, h, weight),
        "liger": partial(liger.linear_cross_entropy, h, weight, labels),
    }
    shape = {"tokens": tokens, "hidden": hidden, "vocab": vocab}
    race("linear_cross_entropy", shape, builders, flops=6 * tokens * hidden * vocab, memory=True)
