"""attention: dense and causal, each pass beside torch's kernels; and over packed documents beside one SDPA call with a mask."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from benchmarks.ops.timing import random
from benchmarks.peers import eager
from openllama.ops import attention

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
HEAD_DIM, TOKENS = 128, 16_384
DENSE = pytest.mark.parametrize(
    "seq, heads, kv_heads",
    ((1024, 32, 32), (2048, 32, 32), (4096, 32, 32), (8192, 32, 8), (16_384, 32, 8)),
)
PACKED = pytest.mark.parametrize("heads, kv_heads, head_dim", ((4, 4, 64), (12, 4, 64)))


class Dense:
    """q, k and v as slices of one packed QKV, which `race` is to compare the kernels on."""

    def __init__(self, seq: int, heads: int, kv_heads: int):
        batch = TOKENS // seq
        self.shape = {"batch": batch, "seq": seq, "heads": heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM}
        widths = [heads, kv_heads, kv_heads]
        self.inputs = random(batch, seq, sum(widths), HEAD_DIM).split(widths, dim=2)
        self.dout = random(batch, seq, heads, HEAD_DIM)
        self.product = batch * heads * seq * seq * HEAD_DIM  # flops of one matrix product, half of it masked
        self.calls = {
            "ours:cuda": partial(attention, backend="cuda"),
            **{f"eager:{name}": partial(eager.attention, kernel) for name, kernel in KERNELS.items()},
        }


@pytest.mark.gpu
@DENSE
def test_fwd(race, seq, heads, kv_heads):
    dense = Dense(seq, heads, kv_heads)
    builders = {name: partial(eager.forward, call, *dense.inputs) for name, call in dense.calls.items()}
    race("attention_fwd", dense.shape, builders, flops=2 * dense.product)


@pytest.mark.gpu
@DENSE
def test_bwd(race, seq, heads, kv_heads):
    dense = Dense(seq, heads, kv_heads)
    builders = {
        name: partial(eager.backward, call, dense.inputs, dense.dout) for name, call in dense.calls.items()
    }
    race("attention_bwd", dense.shape, builders, flops=5 * dense.product)


@PACKED
def test_packed(versus, device, dtype, heads, kv_heads, head_dim, tokens=2048, documents=16):
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

    def sdpa():
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
    versus("attention_packed_fwd_bwd", shape, moved, {"ours:torch": ours, "eager:sdpa+mask": sdpa})


@pytest.mark.gpu
@PACKED
def test_packed_on_a_gpu(versus, device, dtype, heads, kv_heads, head_dim):
    test_packed(versus, device, dtype, heads, kv_heads, head_dim)
