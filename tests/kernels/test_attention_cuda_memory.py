"""attention's kernels on Hopper: strides and offsets, autograd, streams, graphs and devices."""

import pytest
import torch

from .contract import BF16, ON_HOPPER
from .rule import LAYOUTS, all_near, gradients_like, laid_out, near, random, run
from .test_attention_cuda import NAN, NO_ANGLES, WIDTHS, make, ours, raw, raw_backward, raw_forward, sdpa

pytestmark = list(ON_HOPPER)


def free(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("layout", LAYOUTS)
@WIDTHS
def test_layout_of_inputs(width, layout):
    """CASES 5: what TMA can't load is copied."""
    tensors = [laid_out(t.contiguous(), layout) for t in make(2, 200, 4, 2, width)]
    before = [t.clone() for t in tensors]
    strided = run(ours, tensors)
    dense = run(ours, [t.contiguous() for t in tensors])
    assert torch.equal(strided[0][0], dense[0][0])
    all_near(strided[1], dense[1], 4, layout, 1.0)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))


@pytest.mark.parametrize("layout", (*LAYOUTS, "heads first", "one for all heads"))
@WIDTHS
def test_layout_of_output_gradients(width, layout):
    """CASES 3."""
    tensors = make(2, 200, 4, 2, width)
    dout = random((2, 200, 4, width), BF16, "cuda", 9)
    if layout == "heads first":
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "one for all heads":
        dout = dout[:, :, :1].expand(dout.shape)
    else:
        dout = laid_out(dout, layout)
    dense = run(ours, tensors, douts=[dout.contiguous()])[1]
    leaves = [t.detach().requires_grad_() for t in tensors]
    all_near(torch.autograd.grad(ours(*leaves), leaves, dout), dense, 4, layout)


@WIDTHS
def test_gradient_of_a_sum(width):
    tensors = make(2, 200, 4, 2, width)
    leaves = [t.detach().requires_grad_() for t in tensors]
    ours(*leaves).sum().backward()
    expected = run(ours, tensors, douts=[torch.ones_like(tensors[0])])[1]
    all_near([leaf.grad for leaf in leaves], expected, 4, "", 1.0)


@pytest.mark.parametrize("seq", (1, 63, 128, 193))
@WIDTHS
def test_every_element_is_written_and_none_beside(width, seq):
    """Gradients in a packed buffer with room around it; freed memory that new tensors may get is NaN."""
    q, k, v = make(2, seq, 4, 2, width)
    dout = random(q.shape, BF16, "cuda", 9)
    for _ in range(3):
        for size in (q.numel() // 2, 2 * 4 * seq):
            torch.full((size,), NAN, device="cuda")
        out, lse = raw_forward(q, k, v)
        assert out.isfinite().all() and lse.isfinite().all()
    wide = torch.full((2, seq + 2, 10, width), NAN, dtype=BF16, device="cuda")
    inner = wide[:, 1:-1, 1:-1]
    grads = inner.split([4, 2, 2], dim=2)
    raw_backward(dout, q, k, v, out, lse, grads=grads)
    assert inner.isfinite().all()
    assert wide.isnan().sum() == wide.numel() - inner.numel()
    all_near(grads, raw_backward(dout, q, k, v, out, lse), 4, "", 1.0)


@WIDTHS
def test_gradients_lie_side_by_side(width):
    """As a packed QKV's does, which they are slices of."""
    leaves = [t.detach().requires_grad_() for t in make(2, 100, 4, 2, width)]
    dq, dk, dv = torch.autograd.grad(ours(*leaves).float().square().sum(), leaves)
    assert dq.stride() == dk.stride() == dv.stride() == (100 * 8 * width, 8 * width, width, 1)
    assert (dk.data_ptr() - dq.data_ptr(), dv.data_ptr() - dk.data_ptr()) == (2 * 4 * width, 2 * 2 * width)


def test_offsets_past_32_bits():
    batch, seq, heads = 2100, 256, 32
    free(40)
    assert batch * seq * heads * 128 > 2**31
    qkv = torch.randn(batch, seq, heads + 2, 128, dtype=BF16, device="cuda")
    dout = torch.randn(batch, seq, heads, 128, dtype=BF16, device="cuda")
    tensors = qkv.split([heads, 1, 1], dim=2)
    (out,), grads = run(ours, tensors, douts=[dout])
    last = [t[-2:].clone() for t in tensors]
    (last_out,), last_grads = run(ours, last, douts=[dout[-2:]])
    assert torch.equal(out[-2:], last_out)
    all_near([g[-2:] for g in grads], last_grads, 4)


def test_more_sequences_than_a_grid_takes():
    """CASES 4."""
    tensors = make(1, 1, 3, 1)
    tensors = [t.expand(80_000, 2, -1, -1).contiguous() for t in tensors]
    tensors[2][:, 1] *= torch.arange(80_000, device="cuda").remainder(7)[:, None, None].to(BF16)
    (out,), grads = run(ours, tensors)
    theirs = run(sdpa, [t[-9:] for t in tensors], douts=[gradients_like([out])[0][-9:]])
    all_near([out[-9:], *(g[-9:] for g in grads)], [*theirs[0], *theirs[1]], 4, "", 4.0)


@pytest.mark.parametrize("shape", ((0, 5, 4, 64), (2, 0, 4, 128)), ids=str)
def test_nothing_to_attend_to(shape):
    tensors = [torch.zeros(shape, dtype=BF16, device="cuda") for _ in range(3)]
    (out,), grads = run(ours, tensors)
    assert out.shape == shape and all(g.shape == shape for g in grads)


# ---------------------------------------------------------------- autograd


def test_each_gradient_alone_and_no_grad():
    tensors = make(2, 200, 4, 2)
    (out,), together = run(ours, tensors)
    for i in range(3):
        needs = [j == i for j in range(3)]
        (one_out,), grads = run(ours, tensors, needs=needs)
        assert torch.equal(one_out, out) and [g is not None for g in grads] == needs
        near(grads[i], together[i], 4)
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        assert torch.equal(ours(*(t.requires_grad_() for t in tensors)), out) and not kept


def test_a_second_derivative_raises():
    leaves = [t.detach().requires_grad_() for t in make(1, 10, 1, 1)]
    (first,) = torch.autograd.grad(ours(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad|twice differentiable"):
        first.square().sum().backward()


@WIDTHS
def test_all_but_dq_have_the_same_bits_again(width):
    tensors, dout = make(4, 1500, 8, 2, width), random((4, 1500, 8, width), BF16, "cuda", 9)
    first = raw(tensors, dout)
    for _ in range(5):
        second = raw(tensors, dout)
        near(second.pop(2), first[2], 2)
        assert all(torch.equal(a, b) for a, b in zip(second, first[:2] + first[3:]))


@WIDTHS
def test_opcheck(width):
    tensors, dout = make(2, 70, 4, 2, width), random((2, 70, 4, width), BF16, "cuda", 9)
    torch.library.opcheck(torch.ops.openllama.attention_fwd, (*tensors, 0.1, True))
    out, lse = raw_forward(*tensors)
    grads = [torch.empty_like(t) for t in tensors]
    torch.library.opcheck(
        torch.ops.openllama.attention_bwd, (dout, *tensors, out, lse, *grads, 0.1, True, *NO_ANGLES)
    )


# ---------------------------------------------------------------- streams, graphs, devices


@WIDTHS
def test_two_streams_at_once(width):
    """Each launch counts its tiles by itself."""
    cases = [
        (make(batch, seq, 8, 2, width, seed=batch), random((batch, seq, 8, width), BF16, "cuda", 9))
        for batch, seq in ((2, 2048), (5, 700))
    ]
    expected = [raw(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = []
    for _ in range(30):
        for stream, case in zip(streams, cases):
            with torch.cuda.stream(stream):
                results.append(raw(*case))
    torch.cuda.synchronize()
    for i, found in enumerate(results):
        out, lse, dq, dk, dv = found
        whole = expected[i % 2]
        near(dq, whole[2], 2)
        assert all(torch.equal(a, b) for a, b in zip((out, lse, dk, dv), (*whole[:2], *whole[3:])))


@WIDTHS
def test_cuda_graph(width):
    """Replays read what the inputs are by then, and count their tiles anew."""
    tensors, dout = make(2, 1000, 8, 2, width), random((2, 1000, 8, width), BF16, "cuda", 9)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        raw(tensors, dout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(ours, tensors, douts=[dout])
    for seed in (2, 3, 4):
        for t, value in zip(tensors, make(2, 1000, 8, 2, width, seed=seed)):
            t.copy_(value)
        graph.replay()
        expected = run(ours, tensors, douts=[dout])
        assert torch.equal(captured[0][0], expected[0][0])
        all_near(captured[1], expected[1], 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is here")
def test_another_device_than_the_current_one():
    tensors = make(1, 200, 4, 2, device="cuda:1")
    (out,), grads = run(ours, tensors)
    (expected,), expected_grads = run(ours, [t.to("cuda:0") for t in tensors])
    assert torch.cuda.current_device() == 0 and torch.equal(out.to("cuda:0"), expected)
    all_near([g.to("cuda:0") for g in grads], expected_grads, 2)
