"""rotary on a packed QKV, forward and backward, beside transformers' apply_rotary_pos_emb."""

import pytest
import torch

from openllama.ops import rotary, rotary_tables


def huggingface(qkv, cos, sin, heads):
    """As transformers does: q and k by themselves, each a product with cos and one of its half-turned copy with sin."""
    q, k, v = qkv.split([heads, heads, heads], dim=1)
    q, k = (
        t * cos + torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], -1) * sin
        for t in (q, k)
    )
    return q, k, v


@pytest.mark.parametrize("heads, head_dim", ((4, 64), (12, 64), (16, 128)))
def test_rotary(versus, device, dtype, heads, head_dim, tokens=2048):
    x = torch.randn(tokens, 3 * heads, head_dim, device=device).to(dtype).requires_grad_()
    dout = torch.randn(tokens, 3 * heads, head_dim, device=device).to(dtype)
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    cos, sin = rotary_tables(head_dim, tokens, device=device)
    wide_cos, wide_sin = (torch.cat([t, t], -1)[:, None].to(dtype) for t in (cos, sin))

    def ours():
        out = rotary(x, cos, sin, positions, 2 * heads)  # as the model does
        torch.autograd.grad(out.split([heads] * 3, dim=1), x, dout.split([heads] * 3, dim=1))

    def eager():
        out = huggingface(x, wide_cos, wide_sin, heads)
        torch.autograd.grad(out, x, dout.split([heads] * 3, dim=1))

    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "dtype": str(dtype)[6:]}
    moved = 4 * x.numel() * x.element_size()  # forward and backward: read and write
    versus("rotary_fwd_bwd", shape, moved, {"ours": ours, "eager:hf": eager})
