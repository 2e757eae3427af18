"""rms_norm, with and without the residual add; test_rms_norm_cuda.py holds what only a GPU can show."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openllama.ops import rms_norm

from .contract import BF16, F16, F32, F64, Contract
from .rule import all_near, assert_error_rule, random, run

EPS = 1e-6


def huggingface(x, weight, residual=None):
    """transformers' LlamaRMSNorm, after the add."""
    h = x if residual is None else x + residual
    wide = h if h.dtype == F64 else h.float()
    y = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(h.dtype)
    return y if residual is None else (y, h)


def inputs(rows, hidden, dtype, device, seed=0, weight_dtype=None):
    weight = 1 + random((hidden,), weight_dtype or dtype, device, seed + 1, scale=0.1)
    return [
        random((rows, hidden), dtype, device, seed),
        weight,
        random((rows, hidden), dtype, device, seed + 2),
    ]


class TestRmsNorm(Contract):
    sizes = (41, 1, 7, 123, 256, 3584, 5120, 8192)  # hidden

    def make(self, rows, size, dtype, device, seed=0):
        return inputs(rows, size, dtype, device, seed)[:2], ()

    def op(self, x, weight, backend=None):
        return rms_norm(x, weight, EPS, backend=backend)

    def eager(self, x, weight):
        return huggingface(x, weight)

    def floor(self, size):
        # With few columns dweight may be small beside its 33 terms, which are 28 in all; with one, dx is what two
        # equal terms leave. The fuzzer holds y to its own size.
        return 28.0 if size < 16 else 0.0

    def fuzz_size(self, rng):
        return rng.choice((2, 3, 8, 15, 16, 17, 64, 100, 257, 1000))

    def raw(self, device, dtype):
        if dtype == F64 or (device == "cpu" and dtype == F16):
            pytest.skip("the raw op has no such kernel")
        wide, ops = random((6, 5, 40), dtype, device, 0), torch.ops.openllama
        weight, rstd = torch.ones(16, device=device), torch.ones(5, device=device)
        x, residual, h, dy, dh = (wide[i, :, i : i + 16] for i in range(5))
        return [
            (ops.rms_norm_fwd.default, (x, None, weight, EPS)),
            (ops.rms_norm_fwd.default, (x, residual, weight, EPS)),
            (ops.rms_norm_bwd.default, (dy, None, h, weight, rstd, True, False)),
            (ops.rms_norm_bwd.default, (dy, dh, h, weight, rstd, False, True)),
            (ops.rms_norm_bwd.default, (dy, dh, h, weight, rstd, True, True)),
        ]


class TestRmsNormResidual(TestRmsNorm):
    sizes = (41, 7, 3584, 8192)

    def make(self, rows, size, dtype, device, seed=0):
        return inputs(rows, size, dtype, device, seed), ()

    def op(self, x, weight, residual, backend=None):
        return rms_norm(x, weight, EPS, residual, backend=backend)

    def eager(self, x, weight, residual):
        return huggingface(x, weight, residual)

    test_opcheck = test_fake_has_the_real_strides = None  # TestRmsNorm checks the same raw ops


@pytest.mark.parametrize("dtype", (BF16, F16))
def test_fp32_weight_with_narrow_input(device, dtype):
    tensors = inputs(65, 123, dtype, device, weight_dtype=F32)
    y, grads = run(lambda *t: rms_norm(*t[:2], EPS, t[2]), tensors)
    assert y[0].dtype == dtype and grads[1].dtype == F32
    assert_error_rule(lambda *t: rms_norm(*t[:2], EPS, t[2]), huggingface, tensors)


def test_many_rows_lose_no_weight_gradient(device):
    """bf16 sums of 20,000 rows would stall: the sum is fp32 and rounded once."""
    x, weight, _ = inputs(20_000, 41, BF16, device)
    (_, grad) = run(lambda x, w: rms_norm(x, w), [x, weight], douts=[torch.ones_like(x)])[1]
    wide = x.double()
    exact = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).sum(0)
    assert (grad.double() - exact).abs().max() <= torch.finfo(BF16).eps / 2 * exact.abs().max() + 1e-3


def test_compiled_with_an_eps_that_changes():
    """Two norms of one model in a process: the second eps is a symbol of the graph."""
    torch._dynamo.reset()
    x, weight, _ = inputs(9, 41, F32, "cpu")
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for eps in (1e-6, 1e-5, 1e-2):
        assert torch.equal(compiled(x, weight, eps), rms_norm(x, weight, eps))


@pytest.mark.parametrize("used", ("y", "h"))
def test_one_output_unused(device, used):
    tensors = inputs(9, 41, F32, device)
    index = "yh".index(used)
    ours = run(lambda *t: rms_norm(*t[:2], EPS, t[2])[index], tensors, needs=[True, used == "y", True])
    theirs = run(lambda *t: huggingface(*t)[index], tensors, needs=[True, used == "y", True])
    all_near(ours[0] + ours[1], theirs[0] + theirs[1], 4)


def test_x_and_residual_get_gradients_of_their_own():
    x, weight, residual = (t.requires_grad_() for t in inputs(4, 8, F32, "cpu"))
    y, h = rms_norm(x, weight, EPS, residual)
    (y.sum() + h.sum()).backward()
    assert torch.equal(x.grad, residual.grad) and x.grad.data_ptr() != residual.grad.data_ptr()


def test_a_change_of_x_before_backward_is_noticed():
    x, weight = (t.requires_grad_() for t in inputs(4, 8, F32, "cpu")[:2])
    moved = x * 1
    y = rms_norm(moved, weight)
    moved.add_(1)
    with pytest.raises(RuntimeError, match=r"modified.*inplace"):
        y.sum().backward()


class Calls(TorchDispatchMode):
    """The arguments of each openllama op that runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "openllama":
            self.seen.append((func.__name__.split(".")[0], args))
        return func(*args, **(kwargs or {}))


def test_an_output_that_nothing_uses_has_no_gradient():
    """The last norm of a model: its sum is not needed, so no zeros are made and read."""
    tensors = inputs(4, 8, F32, "cpu")
    with Calls() as calls:
        run(lambda *t: rms_norm(*t[:2], EPS, t[2])[0], tensors)
        run(lambda x, r: rms_norm(x, tensors[1], EPS, r)[1], tensors[::2])
    assert [name for name, _ in calls.seen] == ["rms_norm_fwd", "rms_norm_bwd", "rms_norm_fwd"]
    assert calls.seen[1][1][1] is None


@pytest.mark.parametrize("needs", ((True, False), (False, True), (True, True)))
def test_frozen_gradients_are_not_computed(needs):
    x, weight, _ = inputs(4, 8, F32, "cpu")
    with Calls() as calls:
        run(rms_norm, [x, weight], needs=needs)
    assert [(name, args[5:]) for name, args in calls.seen[1:]] == [("rms_norm_bwd", needs)]


def test_threads_do_not_change_the_weight_gradient():
    x, weight, _ = inputs(1000, 256, F32, "cpu")
    grads = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        grads.append(run(rms_norm, [x, weight])[1])
    for dx, dweight in grads[1:]:
        assert torch.equal(dx, grads[0][0]) and torch.equal(dweight, grads[0][1])


def test_nan_and_infinity_stay_in_their_row(device):
    for value in (float("nan"), float("inf")):
        x, weight, _ = inputs(3, 41, F32, device)
        x[1, 7] = value
        y = rms_norm(x, weight)
        assert not y[1, 7].isfinite() and y[::2].isfinite().all()


def test_any_leading_shape(device):
    x, weight, _ = inputs(30, 7, F32, device)
    assert torch.equal(rms_norm(x.view(2, 3, 5, 7), weight), rms_norm(x, weight).view(2, 3, 5, 7))
    assert rms_norm(x[0], weight).shape == (7,) and rms_norm(x[:, :0], weight[:0]).shape == (30, 0)


X, W = torch.ones(4, 8), torch.ones(8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((X, torch.ones(7)), ValueError, r"weight: got shape \(7,\), takes \(8,\)"),
        ((X, [1] * 8), TypeError, "weight: got list, takes a tensor"),
        ((X, W, EPS, 1.0), TypeError, "residual: got float, takes a tensor"),
        ((X, W.half()), TypeError, "weight: got torch.float16, takes x's torch.float32"),
        ((X.int(), W), TypeError, "x: got torch.int32"),
        ((X[0, 0], W), ValueError, "x: got a scalar"),
        ((X, W, -1.0), ValueError, "eps: got -1.0"),
        ((X, W, float("nan")), ValueError, "eps: got nan"),
        ((X, W, EPS, X[:2]), ValueError, r"residual: got shape \(2, 8\), takes \(4, 8\)"),
        ((X, W, EPS, X.bfloat16()), TypeError, "residual: got torch.bfloat16, takes x's torch.float32"),
        ((X, W.to("meta")), ValueError, "weight: got a tensor on meta, takes x's cpu"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        rms_norm(*arguments)
