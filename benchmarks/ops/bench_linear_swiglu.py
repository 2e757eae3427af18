"""SwiGLU with the products beside it, at the shapes of the presets; `ours:reference` is products and SwiGLU in turn."""

from functools import partial

import pytest

from benchmarks.ops.timing import Step, random
from benchmarks.peers import eager, liger
from openllama.ops import linear_swiglu, linear_swiglu_backward_

BACKENDS = ("cuda", "reference")
SHAPES = (  # tokens, hidden, intermediate
    (2048, 4096, 11_008),
    (8192, 4096, 11_008),
    (8192, 4096, 14_336),
    (16_384, 2048, 8192),
    (65_536, 768, 2048),
)


def shape_of(tokens, hidden, intermediate) -> dict[str, int]:
    return {"tokens": tokens, "hidden": hidden, "intermediate": intermediate}


def ours(call, backend) -> Step:
    return partial(call, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, hidden, intermediate", SHAPES)
def test_fwd(race, tokens, hidden, intermediate):
    x, weight = random(tokens, hidden), random(2 * intermediate, hidden) * hidden**-0.5
    builders = {
        **{
            f"ours:{backend}": partial(ours, partial(linear_swiglu, x, [weight]), backend)
            for backend in BACKENDS
        },
        "eager": partial(eager.forward, eager.linear_swiglu, x, weight),
        "compile": partial(eager.forward_compiled, eager.linear_swiglu, x, weight),
        "liger": partial(liger.linear_swiglu, x, weight),
    }
    race(
        "linear_swiglu_fwd",
        shape_of(tokens, hidden, intermediate),
        builders,
        flops=4 * tokens * hidden * intermediate,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, hidden, intermediate", SHAPES)
def test_bwd(race, tokens, hidden, intermediate):
    """As a block takes it that keeps gate_up alone: act is made again."""
    dout, w_down = random(tokens, hidden), random(hidden, intermediate) * hidden**-0.5
    kept = random(tokens, 2 * intermediate)
    gate_up = kept.clone()
    call = partial(linear_swiglu_backward_, dout, w_down, gate_up)
    builders = {
        **{f"ours:{backend}": partial(ours, call, backend) for backend in BACKENDS},
        "eager": partial(eager.forward, eager.linear_swiglu_grad_and_act, dout, w_down, gate_up),
        "compile": partial(eager.forward_compiled, eager.linear_swiglu_grad_and_act, dout, w_down, gate_up),
        "liger": partial(liger.linear_swiglu_grad_and_act, dout, w_down, gate_up),
    }
    race(
        "linear_swiglu_bwd_",
        shape_of(tokens, hidden, intermediate),
        builders,
        flops=2 * tokens * hidden * intermediate,
        prepare=lambda: gate_up.copy_(kept),
    )
