"""attention over packed documents, forward and backward, beside one SDPA call with a block mask.

Dense attention is torch's own SDPA in both, so only packs are compared.
"""

import pytest
import torch
import torch.nn.functional as F

from openllama.ops import attention


@pytest.mark.parametrize("heads, kv_heads, head_dim", ((4, 4, 64), (12, 4, 64)))
def test_attention(versus, device, dtype, heads, kv_heads, head_dim, tokens=2048, documents=16):
    q, k, v = (
        torch.randn(tokens, n, head_dim, device=device).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    length = tokens // documents
    borders = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
    document = torch.arange(tokens, device=device) // length
    mask = (document[:, None] == document[None, :]).tril()
    dout = torch.randn_like(q)

    def ours():
        torch.autograd.grad(attention(q, k, v, borders, length), (q, k, v), dout)

    def eager():
        out = F.scaled_dot_product_attention(
            *(t.transpose(0, 1)[None] for t in (q, k, v)), attn_mask=mask, enable_gqa=heads != kv_heads
        )
        torch.autograd.grad(out[0].transpose(0, 1), (q, k, v), dout)

    shape = {
        "tokens": tokens,
        "documents": documents,
        "heads": heads,
        "kv_heads": kv_heads,
        "dtype": str(dtype)[6:],
    }
    moved = 4 * (2 * q.numel() + 2 * k.numel()) * q.element_size()
    versus("attention_packed_fwd_bwd", shape, moved, {"ours": ours, "eager:sdpa+mask": eager})
