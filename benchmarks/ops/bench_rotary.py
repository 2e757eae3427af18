"""rotary on a packed QKV, forward and backward, beside transformers' apply_rotary_pos_emb, Liger and quack.

On a GPU ours turns the q and k heads in place, as the model does; Liger and quack do too, plain PyTorch writes anew.
"""

from functools import partial

import pytest
import torch

from benchmarks.ops.implementations import ours
from benchmarks.ops.timing import DEVICE, random
from benchmarks.peers import eager, liger, quack
from openllama.ops import rotary, rotary_tables

SEQ = 2048  # of each document on a GPU
SHAPES = [(16_384, 32, 32), (16_384, 32, 8), (16_384, 64, 8), (2048, 32, 8)]


def huggingface(qkv, cos, sin, heads):
    """As transformers does: q and k by themselves."""
    q, k, v = qkv.split([heads, heads, heads], dim=1)
    return eager.hf_rotary(q, cos, sin), eager.hf_rotary(k, cos, sin), v


@pytest.mark.parametrize("heads, head_dim", ((4, 64), (12, 64), (16, 128)))
def test_rotary(versus, device, dtype, heads, head_dim, tokens=2048):
    x = torch.randn(tokens, 3 * heads, head_dim, device=device).to(dtype).requires_grad_()
    dout = torch.randn(tokens, 3 * heads, head_dim, device=device).to(dtype)
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    cos, sin = rotary_tables(head_dim, tokens, device=device)
    wide_cos, wide_sin = (torch.cat([t, t], -1)[:, None].to(dtype) for t in (cos, sin))

    def out_of_place():
        out = rotary(x, cos, sin, positions, 2 * heads)  # as the model does
        torch.autograd.grad(out.split([heads] * 3, dim=1), x, dout.split([heads] * 3, dim=1))

    def hf():
        out = huggingface(x, wide_cos, wide_sin, heads)
        torch.autograd.grad(out, x, dout.split([heads] * 3, dim=1))

    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "dtype": str(dtype)[6:]}
    moved = 4 * x.numel() * x.element_size()  # forward and backward: read and write
    versus("rotary_fwd_bwd", shape, moved, {"ours": out_of_place, "eager:hf": hf})


@pytest.mark.gpu
@pytest.mark.parametrize("inverse", (False, True), ids=("fwd", "bwd"))
@pytest.mark.parametrize("tokens, heads, kv_heads", SHAPES)
def test_inplace(race, tokens, heads, kv_heads, inverse, head_dim=128):
    seq = min(tokens, SEQ)
    rotated, batch = heads + kv_heads, tokens // seq
    x = random(tokens, rotated + kv_heads, head_dim)
    positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE) % seq
    cos, sin = rotary_tables(head_dim, seq, device=DEVICE)
    wide = [torch.cat([t, t], -1)[None].to(x.dtype) for t in (cos, sin)]  # (1, seq, head_dim), transformers'
    q, k = (random(batch, seq, n, head_dim).transpose(1, 2) for n in (heads, kv_heads))
    dq, dk = (random(batch, seq, n, head_dim).transpose(1, 2) for n in (heads, kv_heads))
    packed = x.view(batch, seq, -1, head_dim)

    def hf(q, k):
        return tuple(eager.hf_rotary(t, *(table[:, None] for table in wide)) for t in (q, k))

    step, compiled = eager.forward, eager.forward_compiled
    inputs = (q, k)
    if inverse:
        step, compiled, inputs = eager.backward, eager.backward_compiled, ((q, k), (dq, dk))
    builders = {
        **ours(lambda ops: ops.rotary_(x, cos, sin, positions, 0, rotated, False, inverse)),
        "eager:hf": partial(step, hf, *inputs),
        "compile": partial(compiled, hf, *inputs),
        "liger": partial(liger.rotary, q.clone(), k.clone(), *wide, inverse),
        "quack": partial(quack.rotary, packed.clone(), cos, sin, rotated, inverse),
    }
    shape = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    moved = 2 * x.element_size() * tokens * rotated * head_dim
    race("rotary_bwd" if inverse else "rotary_fwd", shape, builders, moved=moved)
