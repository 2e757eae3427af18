"""The ops as a user of PyTorch writes them, run eagerly or through torch.compile.

`forward`, `backward` and `both` make the step that is timed; a compiled function is one of plain PyTorch, with static
shapes, and one graph or an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

EPS = 1e-6


# ---------------------------------------------------------------- steps


def forward(function: Callable, *inputs) -> Callable[[], object]:
    return lambda: function(*inputs)


def backward(
    function: Callable, inputs: Sequence[torch.Tensor], douts: Sequence[torch.Tensor]
) -> Callable[[], object]:
    """Only the backward: the graph is made here, once."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    return lambda: torch.autograd.grad(outputs, leaves, douts, retain_graph=True)


def both(loss: Callable, *inputs: torch.Tensor) -> Callable[[], object]:
    """Forward of a loss, and its gradient for each input."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(loss(*leaves), leaves)


def compiled(function: Callable) -> Callable:
    # a donated buffer is freed by the first backward of a graph, and `backward` runs it again
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False, fullgraph=True)


def forward_compiled(function: Callable, *inputs) -> Callable[[], object]:
    return forward(compiled(function), *inputs)


def backward_compiled(function: Callable, inputs, douts) -> Callable[[], object]:
    return backward(compiled(function), inputs, douts)


def both_compiled(loss: Callable, *inputs: torch.Tensor) -> Callable[[], object]:
    return both(compiled(loss), *inputs)


# ---------------------------------------------------------------- ops


def rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def add_rms_norm(x, residual, weight):
    h = x + residual
    return F.rms_norm(h, weight.shape, weight, EPS), h


def hf_rms_norm(x, weight):
    """transformers' LlamaRMSNorm."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def hf_add_rms_norm(x, residual, weight):
    h = x + residual
    return hf_rms_norm(h, weight), h


def hf_rotary(t, cos, sin):
    """transformers' apply_rotary_pos_emb of q or k: a product with cos and one of the half-turned copy with sin."""
    half = t.shape[-1] // 2
    return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin


def linear_rotary(x, weight, cos, sin, head_dim, rotated):
    """The first heads of the projection turned, as transformers does."""
    heads = F.linear(x, weight).unflatten(-1, (-1, head_dim))
    return torch.cat([hf_rotary(heads[:, :rotated], cos, sin), heads[:, rotated:]], 1)


def attention(kernel: SDPBackend, q, k, v):
    """Causal, by one of torch's kernels, of (batch, seq, heads, head_dim)."""
    grouped = q.shape[2] != k.shape[2]
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=grouped
        )
    return out.transpose(1, 2)


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_grad_and_act(dact, gate_up):
    """The gradient of gate_up, and act again: what a backward that kept only gate_up hands on to the down projection."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    dact = dact.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dact * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([dgate, dact * silu], -1).to(gate_up.dtype), (silu * up).to(gate_up.dtype)


def linear_swiglu(x, weight):
    """gate_up, which backward needs, and act."""
    gate_up = F.linear(x, weight)
    return gate_up, swiglu(gate_up)


def linear_swiglu_grad_and_act(dout, w_down, gate_up):
    return swiglu_grad_and_act(dout @ w_down, gate_up)


def cross_entropy(logits, labels):
    """Of the logits in fp32, as transformers' loss takes it."""
    return F.cross_entropy(logits.float(), labels)


def linear_cross_entropy(h, weight, labels):
    return cross_entropy(F.linear(h, weight), labels)
