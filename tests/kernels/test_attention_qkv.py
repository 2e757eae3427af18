"""attention_qkv and its backward: attention after rotary, on the packed QKV, against autograd through both."""

import pytest
import torch

from openllama.ops import attention, attention_qkv, attention_qkv_backward, rotary, rotary_tables

from .contract import BF16, F16, F32, on_hopper
from .rule import random
from .test_attention_cuda import make as make_tensors
from .test_attention_cuda import raw_forward

SHAPES = ((2, 37, 4, 2, 64), (1, 130, 2, 2, 128), (3, 64, 4, 1, 128), (1, 1, 1, 1, 64), (2, 129, 3, 1, 128))
BORDERS = (0, 10, 10, 17, 37)


def make(shape, dtype, device, rotary_dim=None):
    """QKV before the turn, dout, tables and positions, which start anywhere."""
    batch, seq, heads, kv_heads, head_dim = shape
    qkv = random((batch, seq, heads + 2 * kv_heads, head_dim), dtype, device, 0)
    dout = random((batch, seq, heads, head_dim), dtype, device, 1)
    cos, sin = rotary_tables(rotary_dim or head_dim, 400, device=device)
    positions = (
        torch.arange(seq, device=device).repeat(batch, 1) + 7 * torch.arange(batch, device=device)[:, None]
    )
    return qkv, dout, cos, sin, positions.flatten()


def turn(qkv, heads, kv_heads, cos, sin, positions):
    return rotary(qkv.flatten(0, -3), cos, sin, positions, heads + kv_heads).view(qkv.shape)


def by_hand(qkv, dout, cos, sin, positions, heads, kv_heads, *borders):
    turned = turn(qkv, heads, kv_heads, cos, sin, positions)
    out, kept = attention_qkv(turned, heads, kv_heads, *borders)
    return out, attention_qkv_backward(dout, kept, cos, sin, positions)


def by_autograd(qkv, dout, cos, sin, positions, heads, kv_heads, *borders):
    qkv = qkv.detach().requires_grad_()
    turned = turn(qkv, heads, kv_heads, cos, sin, positions)
    out = attention(*turned.split([heads, kv_heads, kv_heads], dim=-2), *borders, backend="reference")
    return out.detach(), *torch.autograd.grad(out, qkv, dout)


def assert_near(got, exact, plain):
    """At most twice as far from the exact values as what rounds in between: attention and rotary, one after the other."""
    for name, a, b, c in zip(("out", "dqkv"), got, exact, plain):
        error, allowed = (a.double() - b).abs().max(), (c.double() - b).abs().max()
        scale = b.abs().max() * 4 * torch.finfo(a.dtype).eps
        assert a.isfinite().all() and error <= 2 * allowed + scale, f"{name}: {error} for {allowed}"


def check(shape, dtype, device, borders=(), rotary_dim=None):
    qkv, dout, *angles = make(shape, dtype, device, rotary_dim)
    if borders:
        qkv, dout = qkv[0], dout[0]
    heads = shape[2:4]
    before = qkv.clone()
    got = by_hand(qkv, dout, *angles, *heads, *borders)
    exact = by_autograd(qkv.double(), dout.double(), *angles, *heads, *borders)
    assert got[1].is_contiguous() and torch.equal(qkv, before)
    assert_near(got, exact, by_autograd(qkv, dout, *angles, *heads, *borders))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
def test_values(device, dtype, shape):
    check(shape, dtype, device)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_documents(device, dtype):
    borders = torch.tensor(BORDERS, dtype=torch.int32, device=device)
    check((1, 37, 4, 2, 64), dtype, device, (borders, 20))


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_a_part_of_each_head_may_turn(device, dtype):
    check((2, 37, 4, 2, 128), dtype, device, rotary_dim=32)


def test_a_second_backward_raises(device):
    qkv, dout, *angles = make((1, 8, 2, 1, 32), F32, device)
    _, kept = attention_qkv(qkv, 2, 1)
    attention_qkv_backward(dout, kept, *angles)
    with pytest.raises(RuntimeError, match="second time"):
        attention_qkv_backward(dout, kept, *angles)


def test_errors_are_those_of_attention(device):
    with pytest.raises(ValueError, match=r"takes \(batch, seq, heads, head_dim\)"):
        attention_qkv(torch.ones(4, 6, 8, device=device), 4, 1)


# ---------------------------------------------------------------- what is fused on Hopper


@on_hopper
@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
def test_tables_and_positions_may_lie_anywhere(dtype):
    qkv, dout, cos, sin, positions = make((2, 70, 4, 2, 128), dtype, "cuda")
    expected = by_hand(qkv, dout, cos, sin, positions, 4, 2)[1]
    cos, sin = (torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (cos, sin))
    every_other = torch.stack([positions, positions], 1)[:, 0]
    got = by_hand(qkv, dout, cos, sin, every_other, 4, 2)[1]
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)


@on_hopper
def test_equals_turning_back_afterwards():
    qkv, dout, *angles = make((2, 300, 4, 2, 128), BF16, "cuda")
    _, kept = attention_qkv(qkv, 4, 2)
    got = attention_qkv_backward(dout, kept, *angles)
    parts = [t.requires_grad_() for t in qkv.detach().split([4, 2, 2], dim=2)]
    plain = torch.autograd.grad(attention(*parts, backend="cuda"), parts, dout)
    back = rotary(torch.cat(plain, 2).flatten(0, 1), *angles, 6, inverse=True).view(got.shape)
    torch.testing.assert_close(got, back, rtol=2e-2, atol=2e-2)
    assert torch.equal(got[:, :, 6:], plain[2])


@on_hopper
@pytest.mark.parametrize(
    "change, message",
    [
        ({"sin": None}, "cos, sin and positions together"),
        ({"cos": torch.ones(9, 32)}, "cos must"),
        ({"positions": torch.zeros(7, dtype=torch.int32)}, "positions must"),
    ],
    ids=str,
)
def test_raw_errors_of_the_angles(change, message):
    given = {
        "cos": torch.ones(9, 64),
        "sin": torch.ones(9, 64),
        "positions": torch.zeros(8, dtype=torch.int32),
    }
    given = {name: t if t is None else t.cuda() for name, t in {**given, **change}.items()}
    tensors = make_tensors(1, 8, 2, 1)
    out, lse = raw_forward(*tensors)
    grads = [torch.empty_like(t) for t in tensors]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.openllama.attention_bwd(out, *tensors, out, lse, *grads, 0.1, True, *given.values())
