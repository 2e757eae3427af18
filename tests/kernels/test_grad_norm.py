"""grad_norm: against float64 and torch.nn.utils.clip_grad_norm_, and what is no number."""

import math

import pytest
import torch

from openllama.kernels import library
from openllama.kernels.grad_norm import grad_norm
from openllama.ops import adamw

from .contract import BF16, F16, F32, F64
from .rule import laid_out, random

SHAPES = ((), (1,), (7,), (0,), (3, 0), (123, 41), (16_385,), (2, 3, 5, 7), (300, 200))


def gradients(device, dtypes, scale=1.0):
    return [
        random(s, dtypes[i % len(dtypes)], device, i, scale * 10.0 ** (i % 3)) for i, s in enumerate(SHAPES)
    ]


def exact(grads):
    return math.sqrt(sum(g.double().square().sum().item() for g in grads))


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("dtypes", ((F32,), (BF16,), (F16,), (F64,), (F32, BF16, F16), (BF16, F64)), ids=str)
def test_norm_and_scale(device, backend, dtypes):
    grads = gradients(device, dtypes)
    for max_norm in (math.inf, 1e6, 10.0):
        norm, scale = grad_norm(grads, max_norm, backend=backend)
        assert (
            norm.dtype == scale.dtype == F32
            and norm.shape == scale.shape == ()
            and norm.device.type == device
        )
        assert norm.item() == pytest.approx(exact(grads), rel=1e-5)
        assert scale.item() == pytest.approx(min(1.0, max_norm / exact(grads)), rel=1e-5)


@pytest.mark.parametrize("max_norm", (1.0, 1e9))
def test_a_step_equals_torchs_clipping(device, max_norm):
    """clip_grad_norm_ and a step, against a step that scales the gradients as it reads them."""
    grads = gradients(device, (F32,))
    params = [[random(g.shape, F32, device, 50 + i) for i, g in enumerate(grads)] for _ in range(2)]
    moments = [[[torch.zeros_like(g) for g in grads] for _ in range(2)] for _ in range(2)]
    hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1, "step": 1}
    norm, scale = grad_norm(grads, max_norm)
    adamw(params[0], grads, *moments[0], grad_scale=scale, **hyper)
    leaves = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for leaf, g in zip(leaves, grads):
        leaf.grad = g.clone()
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(leaves, max_norm), rtol=1e-5, atol=0)
    adamw(params[1], [leaf.grad for leaf in leaves], *moments[1], **hyper)
    for ours, theirs in zip(params[0], params[1]):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_large_tensor_keeps_its_digits(device):
    """Sums of 20 million squares one after the other would be 0.1% off in fp32."""
    for dtype in (F32, BF16):
        g = torch.ones(20_000_000, dtype=dtype, device=device)
        assert grad_norm([g])[0].item() == pytest.approx(2e7**0.5, rel=1e-5)


@pytest.mark.parametrize(
    "layout", ("slice", "inner slice", "misaligned", "every other", "transposed", "expanded")
)
def test_layouts(device, layout):
    grads = [laid_out(random((6, 40), dtype, device, 3), layout) for dtype in (F32, BF16)]
    before = [g.clone() for g in grads]
    assert grad_norm(grads)[0].item() == pytest.approx(exact(grads), rel=1e-5)
    assert all(torch.equal(g, b) for g, b in zip(grads, before))


@pytest.mark.parametrize("backend", (None, "reference"))
def test_what_is_no_number(device, backend):
    """Arithmetic's scale: a norm that is NaN gives NaN, an infinite one 0, or NaN without a largest norm."""
    for bad, max_norm, scale in (
        (math.nan, 1.0, math.nan),
        (math.inf, 1.0, 0.0),
        (-math.inf, math.inf, math.nan),
    ):
        grads = gradients(device, (F32,))
        grads[-1][7, 3] = bad
        results = grad_norm(grads, max_norm, backend=backend)
        assert [r.item() for r in results] == pytest.approx([abs(bad), scale], nan_ok=True)


def test_zeros_and_nothing(device):
    for grads in ([], [torch.zeros(0, device=device)], [torch.zeros(3, 4, device=device)] * 2):
        assert [float(r) for r in grad_norm(grads, 1.0)] == [0.0, 1.0]


def test_a_thousand_tensors(device):
    """More than a launch of the kernel takes."""
    grads = [random((i % 5,), (F32, BF16)[i % 2], device, i) for i in range(1700)]
    assert grad_norm(grads)[0].item() == pytest.approx(exact(grads), rel=1e-5)


def test_two_runs_are_equal(device):
    grads = gradients(device, (F32, BF16))
    assert torch.equal(torch.stack(grad_norm(grads, 1.0)), torch.stack(grad_norm(grads, 1.0)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_nothing_waits_for_the_device(backend):
    grads = gradients("cuda", (F32, BF16))
    grad_norm(grads, 1.0, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grad_norm(grads, 1.0, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(
        grad_norm(grads, 1.0, backend=backend), grad_norm(grads, 1.0, backend="reference")
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_opcheck():
    for namespace in (torch.ops.openllama, torch.ops.openllama_triton):
        torch.library.opcheck(namespace.grad_norm.default, (gradients("cuda", (F32, BF16)), 1.0))


@pytest.mark.skipif(bool(library.missing), reason="no library")
def test_fake_gives_the_shape():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        out = torch.ops.openllama.grad_norm([torch.empty(3, dtype=BF16), torch.empty(4)], 1.0)
    assert out.shape == (2,) and out.dtype == F32


@pytest.mark.parametrize(
    "grads, max_norm, message",
    [
        ([torch.zeros(3), None], 1.0, r"grads\[1\]: got NoneType, takes a tensor"),
        ([torch.zeros(3), torch.zeros(3).int()], 1.0, r"grads\[1\]: got torch.int32"),
        ([torch.zeros(3), torch.zeros(3, device="meta")], 1.0, r"grads\[1\]: got a tensor on meta, takes grads\[0\]'s cpu"),
        ([torch.zeros(3)], 0.0, r"max_norm: got 0.0, takes a number above 0"),
        ([torch.zeros(3)], math.nan, r"max_norm: got nan"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", (None, "reference"))
def test_bad_input_is_named(grads, max_norm, message, backend):
    with pytest.raises((TypeError, ValueError), match=message):
        grad_norm(grads, max_norm, backend=backend)
