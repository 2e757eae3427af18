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
DENSE = pytest.mark.parametrize(
    "batch, seq, heads, kv_heads, head_dim",
    (
        (16, 1024, 32, 32, 128), (8, 2048, 32, 32, 128), (4, 4096, 32, 32, 128), (2, 8192, 32, 8, 128),
        (1, 16_384, 32, 8, 128),
        (8, 1024, 12, 12, 64), (64, 1024, 12, 12, 64), (8, 2048, 32, 8, 64), (2, 8192, 32, 8, 64),
    ),
)  # fmt: skip
PACKED = pytest.mark.parametrize("heads, kv_heads, head_dim", ((4, 4, 64), (12, 4, 64)))


class Dense:
    """q, k and v as slices of one packed QKV, which `race` is to compare the kernels on."""

    def __init__(self, batch: int, seq: int, heads: int, kv_heads: int, head_dim: int):
        self.shape = {"batch": batch, "seq": seq, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        widths = [heads, kv_heads, kv_heads]
        self.inputs = random(batch, seq, sum(widths), head_dim).split(widths, dim=2)
        self.dout = random(batch, seq, heads, head_dim)
        self.product = batch * heads * seq * seq * head_dim  # flops of one matrix product, half of it masked
        self.calls = {
            "ours:cuda": partial(attention, backend="cuda"),
            **{f"eager:{name}": partial(eager.attention, kernel) for name, kernel in KERNELS.items()},
        }


@pytest.mark.gpu
@DENSE
def test_fwd(race, batch, seq, heads, kv_heads, head_dim):
    dense = Dense(batch, seq, heads, kv_heads, head_dim)
    builders = {name: partial(eager.forward, call, *dense.inputs) for name, call in dense.calls.items()}
    race("attention_fwd", dense.shape, builders, flops=2 * dense.product)


@pytest.mark.gpu
@DENSE
def test_bwd(race, batch, seq, heads, kv_heads, head_dim):
    dense = Dense(batch, seq, heads, kv_heads, head_dim)
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
