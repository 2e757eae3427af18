"""rms_norm with the residual add, forward and backward, beside transformers' LlamaRMSNorm and F.rms_norm."""

import pytest
import torch
import torch.nn.functional as F

from openllama.ops import rms_norm

EPS = 1e-6


def huggingface(x, weight, residual):
    h = x + residual
    wide = h.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype), h


def torch_rms_norm(x, weight, residual):
    h = x + residual
    return F.rms_norm(h, weight.shape, weight, EPS), h


def ours(x, weight, residual):
    return rms_norm(x, weight, EPS, residual)


@pytest.mark.parametrize("hidden", (256, 768, 2048))
def test_rms_norm(versus, device, dtype, hidden, tokens=2048):
    x, residual, dy, dh = torch.randn(4, tokens, hidden, device=device).to(dtype)
    weight = torch.ones(hidden, dtype=dtype, device=device)
    leaves = [t.requires_grad_() for t in (x, weight, residual)]

    def step(function):
        return lambda: torch.autograd.grad(function(*leaves), leaves, (dy, dh))

    shape = {"tokens": tokens, "hidden": hidden, "dtype": str(dtype)[6:]}
    moved = 8 * x.numel() * x.element_size()  # forward: x, residual, y, h; backward: dy, dh, h, dx
    versus("rms_norm_fwd_bwd", shape, moved,
           {"ours": step(ours), "eager:hf": step(huggingface), "eager:F.rms_norm": step(torch_rms_norm)})  # fmt: skip
