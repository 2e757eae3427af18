"""rms_norm's CUDA kernels: alignment, devices, sizes. test_rms_norm.py has the rest, on both devices."""

import functools

import pytest
import torch

from openllama.kernels import backend, library
from openllama.ops import rms_norm

from .contract import BF16, F16, F32
from .rule import all_near, near, random, run
from .test_rms_norm import Calls, inputs

pytestmark = pytest.mark.gpu


def both(tensors, douts=None):
    """Outputs and gradients of x + residual."""
    outputs, grads = run(lambda x, w, r: rms_norm(x, w, 1e-6, r), tensors, douts=douts)
    return [*outputs, *grads]


def free(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


def test_library_was_built_for_this_card():
    assert library.has_cuda and library.build_info()["stream_symbol"]
    assert backend.explain("rms_norm", torch.device("cuda"), BF16, 4096).backend == "cuda"


@pytest.mark.parametrize("dtype", (F32, BF16, F16))
@pytest.mark.parametrize("hidden", (8, 4096, 16_384, 16_385, 20_000))
def test_wide_rows(dtype, hidden):
    """To 16,384 columns the kernel runs, above that the reference; both give the same."""
    tensors = inputs(5, hidden, dtype, "cuda")
    with Calls() as calls:
        y, h = rms_norm(*tensors[:2], 1e-6, tensors[2])
    assert bool(calls.seen) == (hidden <= 16_384)
    theirs = run(lambda x, w, r: rms_norm(x, w, 1e-6, r, backend="reference"), tensors)
    all_near([y, h, *both(tensors)[2:]], [*theirs[0], *theirs[1]], 4)


def test_many_rows_and_determinism():
    """More rows than blocks in backward: each block sums several."""
    tensors = inputs(70_000, 256, BF16, "cuda")
    first, second = both(tensors), both(tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_compiled_on_a_side_stream():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w, r: rms_norm(x * 2, w, 1e-6, r), fullgraph=True)
    tensors = inputs(256, 1024, BF16, "cuda")
    expected = run(lambda x, w, r: rms_norm(x * 2, w, 1e-6, r), tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = run(compiled, tensors)
    stream.synchronize()
    for ours, theirs in zip(results, expected):
        all_near(ours, theirs, 2)


def test_misaligned_rows_take_single_elements():
    """Rows that don't start on 16 bytes: an odd hidden, an odd row stride, an odd base."""
    for hidden, stride, base in ((127, 127, 0), (128, 131, 0), (128, 128, 1), (128, 136, 3)):
        buffer = random((3, 40 * stride + base + 8), BF16, "cuda", 0)
        x, residual, dy = (b[base : base + 40 * stride].view(40, stride)[:, :hidden] for b in buffer)
        weight = inputs(1, hidden, BF16, "cuda")[1]
        ours = run(lambda x, w, r: rms_norm(x, w, 1e-6, r), [x, weight, residual], douts=[dy, dy])
        theirs = run(
            lambda x, w, r: rms_norm(x, w, 1e-6, r, backend="reference"),
            [x, weight, residual],
            douts=[dy, dy],
        )
        for o, t in zip(ours, theirs):
            all_near(o, t, 4, f"{hidden} {stride} {base}")


@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_more_than_2_to_the_31_elements(backend):
    free(30)
    rows, hidden = 2**31 // 8192 + 5, 8192
    x = torch.ones(rows, hidden, dtype=BF16, device="cuda")
    x[-1] = random((hidden,), BF16, "cuda", 0)
    weight = inputs(1, hidden, BF16, "cuda")[1]
    dy = torch.ones(1, 1, dtype=BF16, device="cuda").expand(rows, hidden)
    op = functools.partial(rms_norm, backend=backend)
    leaf = x.requires_grad_()
    y = op(leaf, weight)
    near(y[-1:].detach(), op(x[-1:].detach(), weight), 0)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    (last,) = run(op, [x[-1:].detach(), weight], needs=[True, False], douts=[dy[-1:]])[1][:1]
    near(dx[-1:], last, 2)


def test_slice_at_an_offset_beyond_2_to_the_31():
    free(12)
    buffer = torch.zeros(2**31 + 4096, dtype=BF16, device="cuda")
    x = buffer[2**31 + 64 :][: 8 * 256].view(8, 256).copy_(random((8, 256), BF16, "cuda", 0))
    weight = inputs(1, 256, BF16, "cuda")[1]
    near(rms_norm(x, weight), rms_norm(x.clone(), weight), 0)


def test_a_launch_that_fails_raises():
    free(40)
    rows = torch.ones(1, 8, device="cuda").expand(2**31, 8)  # more rows than a grid has blocks
    with pytest.raises(RuntimeError, match="rms_norm_fwd: cudaErrorInvalidConfiguration"):
        torch.ops.openllama.rms_norm_fwd(rows[:, :1], None, torch.ones(1, device="cuda"), 1e-6)


def test_hopper_code_runs_on_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("sm_90a code runs on capability (9, 0) only")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    torch.ops.openllama.hopper_probe(out)
    assert out.item() == 90


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    tensors = [t.to("cuda:1") for t in inputs(64, 512, BF16, "cpu")]
    torch.cuda.set_device(0)
    results = both(tensors)
    assert torch.cuda.current_device() == 0 and all(r.device == torch.device("cuda:1") for r in results)
    with torch.cuda.device(1):
        assert all(torch.equal(r, e) for r, e in zip(results, both(tensors)))
