"""swiglu on a packed gate-up, forward and backward, beside F.silu(gate) * up and Liger.

swiglu_bwd_ takes dact and gate-up and leaves in their place act, which was not kept, and gate-up's gradient.
"""

from functools import partial

import pytest
import torch

from benchmarks.ops.implementations import ours
from benchmarks.ops.timing import random
from benchmarks.peers import eager, liger
from openllama.ops import swiglu

SHAPES = ((8192, 5632), (8192, 11_008), (8192, 14_336), (8192, 28_672), (2048, 11_008))


@pytest.mark.parametrize("intermediate", (704, 2048, 5632))  # of hidden 256, 768, 2048
def test_swiglu(versus, device, dtype, intermediate, tokens=2048):
    gate_up = torch.randn(tokens, 2 * intermediate, device=device).to(dtype).requires_grad_()
    dact = torch.randn(tokens, intermediate, device=device).to(dtype)

    def step(function):
        return lambda: torch.autograd.grad(function(gate_up), gate_up, dact)

    shape = {"tokens": tokens, "intermediate": intermediate, "dtype": str(dtype)[6:]}
    # forward: gate, up, act; backward: dact, gate, up, both gradients
    moved = 8 * dact.numel() * dact.element_size()
    versus("swiglu_fwd_bwd", shape, moved, {"ours": step(swiglu), "eager": step(eager.swiglu)})


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, intermediate", SHAPES)
def test_fwd(race, tokens, intermediate):
    gate_up = random(tokens, 2 * intermediate)
    builders = {
        **ours(lambda ops: ops.swiglu_fwd(gate_up)),
        "eager": partial(eager.forward, eager.swiglu, gate_up),
        "compile": partial(eager.forward_compiled, eager.swiglu, gate_up),
        "liger": partial(liger.swiglu_fwd, gate_up),
    }
    shape = {"tokens": tokens, "intermediate": intermediate}
    race("swiglu_fwd", shape, builders, moved=3 * gate_up.nbytes // 2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, intermediate", SHAPES)
def test_bwd(race, tokens, intermediate):
    gate_up, dact = random(tokens, 2 * intermediate), random(tokens, intermediate)
    builders = {
        **ours(lambda ops: ops.swiglu_bwd(dact, gate_up)),
        "eager": partial(eager.backward, eager.swiglu, (gate_up,), (dact,)),
        "compile": partial(eager.backward_compiled, eager.swiglu, (gate_up,), (dact,)),
        "liger": partial(liger.swiglu_bwd, dact, gate_up),
    }
    race("swiglu_bwd", {"tokens": tokens, "intermediate": intermediate}, builders, moved=5 * dact.nbytes)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, intermediate", SHAPES)
def test_bwd_inplace(race, tokens, intermediate):
    kept = random(tokens, 2 * intermediate), random(tokens, intermediate)
    gate_up, dact = (t.clone() for t in kept)

    def restore():
        gate_up.copy_(kept[0])
        dact.copy_(kept[1])

    builders = {
        **ours(lambda ops: ops.swiglu_bwd_(dact, gate_up)),
        "eager": partial(eager.forward, eager.swiglu_grad_and_act, dact, gate_up),
        "compile": partial(eager.forward_compiled, eager.swiglu_grad_and_act, dact, gate_up),
        "liger": partial(liger.swiglu_grad_and_act, dact, gate_up),
    }
    shape = {"tokens": tokens, "intermediate": intermediate}
    race("swiglu_bwd_", shape, builders, moved=6 * dact.nbytes, prepare=restore)
