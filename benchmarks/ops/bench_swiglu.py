"""swiglu on a packed gate-up, forward and backward, beside F.silu(gate) * up."""

import pytest
import torch
import torch.nn.functional as F

from openllama.ops import swiglu


def eager(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("intermediate", (704, 2048, 5632))  # of hidden 256, 768, 2048
def test_swiglu(versus, device, dtype, intermediate, tokens=2048):
    gate_up = torch.randn(tokens, 2 * intermediate, device=device).to(dtype).requires_grad_()
    dact = torch.randn(tokens, intermediate, device=device).to(dtype)

    def step(function):
        return lambda: torch.autograd.grad(function(gate_up), gate_up, dact)

    shape = {"tokens": tokens, "intermediate": intermediate, "dtype": str(dtype)[6:]}
    moved = (
        8 * dact.numel() * dact.element_size()
    )  # forward: gate, up, act; backward: dact, gate, up, both gradients
    versus("swiglu_fwd_bwd", shape, moved, {"ours": step(swiglu), "eager": step(eager)})
