"""Liger Kernel's ops at the level of their kernels, without autograd where that is simple.

Each function makes the step that is timed, or raises ModuleNotFoundError where the package is missing. Liger works in
place where it can: on dy in rms_norm, on q and k in rotary, on the logits in cross_entropy, whose call also waits for the GPU
several times (it counts the labels with .item()).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

EPS = 1e-6
Step = Callable[[], object]


def rms_norm_fwd(x, weight) -> Step:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    return partial(rms_norm_forward, x, weight, EPS, 0.0, "llama", None)


def rms_norm_bwd(dy, x, weight) -> Step:
    """Writes dx over dy."""
    from liger_kernel.ops.rms_norm import rms_norm_backward

    _, x, rstd, block, warps, mode = rms_norm_fwd(x, weight)()
    return partial(rms_norm_backward, dy, x, weight, rstd, 0.0, mode, block, warps, True, None)


def add_rms_norm_fwd(x, residual, weight) -> Step:
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    return partial(fused_add_rms_norm_forward, x, residual, weight, EPS, 0.0, "llama")


def add_rms_norm_bwd(dy, dh, x, residual, weight) -> Step:
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_backward

    _, h, rstd, block, warps, stages, mode = add_rms_norm_fwd(x, residual, weight)()
    return partial(
        fused_add_rms_norm_backward, dy, dh, h, weight, rstd, 0.0, mode, block, warps, stages, False
    )


def rotary(q, k, cos, sin, inverse: bool) -> Step:
    """In place; q, k: (batch, heads, seq, head_dim), views of (batch, seq, heads, head_dim)."""
    from liger_kernel.ops.rope import rope_backward, rope_forward

    return partial(rope_backward if inverse else rope_forward, q, k, cos, sin)


def swiglu_fwd(gate_up) -> Step:
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    return partial(swiglu_fused_gate_up_forward, gate_up)


def swiglu_bwd(dact, gate_up) -> Step:
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward

    return partial(swiglu_fused_gate_up_backward, gate_up, dact)


def swiglu_grad_and_act(dact, gate_up) -> Step:
    """It has no kernel for both: act first, then the gradient in place."""
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward, swiglu_fused_gate_up_forward

    def step():
        _, act = swiglu_fused_gate_up_forward(gate_up)
        return act, swiglu_fused_gate_up_backward(gate_up, dact, in_place=True)

    return step


def linear_swiglu(x, weight) -> Step:
    """torch's product, and its kernel."""
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    return lambda: swiglu_fused_gate_up_forward(x @ weight.t())


def linear_swiglu_grad_and_act(dout, w_down, gate_up) -> Step:
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward, swiglu_fused_gate_up_forward

    def step():
        _, act = swiglu_fused_gate_up_forward(gate_up)
        return act, swiglu_fused_gate_up_backward(gate_up, dout @ w_down, in_place=True)

    return step


def cross_entropy(logits, labels) -> Step:
    """Forward, and the gradient over the logits."""
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    leaf = logits.detach().requires_grad_()  # it looks at this to make the gradient
    return partial(cross_entropy_forward, leaf, labels, None, -100, 0.0, 0.0, "mean", None, False)


def linear_cross_entropy(h, weight, labels) -> Step:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    leaves = [h.detach().requires_grad_(), weight.detach().requires_grad_()]

    def step():
        loss = LigerFusedLinearCrossEntropyFunction.apply(*leaves, labels)[0]
        return torch.autograd.grad(loss, leaves)

    return step
