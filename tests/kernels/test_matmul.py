"""matmul: products and sums in place, and the gradients of weights that are made of them."""

import pytest
import torch

from openllama.kernels.matmul import linear_weight_gradient
from openllama.ops import matmul

from .contract import BF16, F16, F32, F64
from .rule import random

SHAPES = ((5, 7, 3), (1, 1, 1), (64, 96, 128), (33, 130, 65), (256, 8, 512))


def operands(m, n, k, dtype, device, layout="rows"):
    a, b = random((m, k), dtype, device, 0), random((k, n), dtype, device, 1)
    if layout == "columns":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    elif layout == "spread":
        a, b = random((m, k, 2), dtype, device, 0)[..., 0], random((k, n, 3), dtype, device, 1)[..., 1]
    elif layout == "slices":
        a = random((m, k + 9), dtype, device, 0)[:, 4 : k + 4]
        b = random((n, k + 3), dtype, device, 1)[:, 1 : k + 1].t()
    return a, b


def allowed(a, b, out_dtype, sums=0.0):
    """Of each element: fp32 sums of k products in any order, and the rounding of what comes out."""
    exact = a.double().abs() @ b.double().abs() + abs(sums)
    eps = torch.finfo(out_dtype).eps if out_dtype != F64 else 1e-12
    return exact * (max(eps, 1e-7) + (2e-6 if out_dtype != F64 else 0))


@pytest.mark.parametrize("layout", ("rows", "columns", "slices", "spread"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wide", (False, True), ids=("own", "fp32"))
@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=str)
def test_product_and_sum(device, dtype, wide, shape, layout):
    if dtype == F64 and wide:
        pytest.skip("fp64 is not rounded to fp32")
    m, n, k = shape
    a, b = operands(m, n, k, dtype, device, layout)
    exact, kind = a.double() @ b.double(), F32 if wide else dtype
    tf32 = torch.backends.cuda.matmul.allow_tf32
    assert not tf32, "fp32 products are held to fp32's error here"
    assert wide or ((matmul(a, b).double() - exact).abs() <= allowed(a, b, dtype)).all()
    out = torch.full((m, n + 5), float("nan"), dtype=kind, device=device)
    into = out[:, 2 : n + 2]
    for call in range(5):  # on a GPU the third is timed, and others follow the winner
        assert matmul(a, b, into) is into
        assert ((into.double() - exact).abs() <= allowed(a, b, kind)).all(), call
    into.fill_(3)
    for call in range(4):
        matmul(a, b, into, accumulate=True)
        sums = 3 + (call + 1) * exact
        assert ((into.double() - sums).abs() <= 8 * allowed(a, b, kind, 3)).all(), call
    assert out[:, :2].isnan().all() and out[:, n + 2 :].isnan().all()  # what lies beside it


def test_empty(device):
    assert matmul(torch.ones(0, 4, device=device), torch.ones(4, 3, device=device)).shape == (0, 3)
    out = torch.full((2, 3), 7.0, device=device)
    assert (matmul(torch.ones(2, 0, device=device), torch.ones(0, 3, device=device), out) == 0).all()
    assert (
        matmul(torch.ones(2, 0, device=device), torch.ones(0, 3, device=device), out + 1, accumulate=True)
        == 1
    ).all()


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"b": torch.ones(4, 2)}, ValueError, r"a, b: got shapes \(2, 3\) and \(4, 2\)"),
        ({"b": torch.ones(3, 2, dtype=BF16)}, TypeError, "b: got torch.bfloat16, takes a's torch.float32"),
        ({"a": torch.ones(2, 3, dtype=torch.int32)}, TypeError, "a: got torch.int32"),
        ({"out": torch.ones(2, 3)}, ValueError, r"out: got shape \(2, 3\), takes \(2, 2\)"),
        ({"out": torch.ones(2, 2, dtype=BF16)}, TypeError, "out: got torch.bfloat16, takes a's"),
        ({"out": torch.ones(2, 2).t()}, ValueError, r"out: got strides \(1, 2\), takes contiguous rows"),
        ({"accumulate": True}, ValueError, "out: got None, takes a tensor to add to"),
        ({"backend": "cpu"}, ValueError, "matmul has no cpu kernel"),
        ({"backend": "cublaslt"}, ValueError, "matmul can't run on 'cublaslt' here"),
    ],
)
def test_bad_arguments_are_named(change, kind, message):
    with pytest.raises(kind, match=message):
        matmul(**{"a": torch.ones(2, 3), "b": torch.ones(3, 2)} | change)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_weight_gradients_add_up_where_they_are(device, dtype):
    """In fp32 for a bf16 weight that takes it so, in the memory that was kept for it, and never through autograd."""
    weight = torch.nn.Parameter(random((24, 16), dtype, device, 0))
    weight.grad_dtype = F32
    pieces = [(random((9, 24), dtype, device, i), random((9, 16), dtype, device, i + 5)) for i in range(3)]
    exact = sum(dy.double().t() @ x.double() for dy, x in pieces)
    for _ in range(2):
        for dy, x in pieces:
            assert linear_weight_gradient(weight, dy, x, accumulate=True) is None
        grad = weight.grad
        assert grad.dtype == F32 and (grad.double() - exact).norm() <= 1e-6 * exact.norm()
        assert not hasattr(weight, "grad_buffer") or grad is weight.grad_buffer
        weight.grad_buffer, weight.grad = grad, None
    given = linear_weight_gradient(weight, *pieces[0], accumulate=False)
    assert weight.grad is None and given.dtype == F32 and given is not weight.grad_buffer


@pytest.mark.gpu
def test_deterministic_runs_take_the_first_proposal():
    """Timing decides otherwise, and might not decide the same twice."""
    a, b = operands(512, 1024, 768, BF16, "cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = [matmul(a, b) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[0], one) for one in first)
    assert torch.equal(first[0], matmul(a, b, tune=False))


@pytest.mark.gpu
def test_a_captured_product_is_not_timed():
    """A graph must not wait for the device: shapes that are new there take the first proposal."""
    a, b = operands(320, 192, 448, BF16, "cuda")
    out = torch.empty(320, 192, device="cuda")
    matmul(operands(8, 8, 8, BF16, "cuda")[0], operands(8, 8, 8, BF16, "cuda")[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            matmul(a, b, out)
    out.zero_()
    graph.replay()
    assert ((out.double() - a.double() @ b.double()).abs() <= allowed(a, b, F32)).all()
