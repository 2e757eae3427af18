"""linear_swiglu: both passes against float64, on what tiles and rows of odd sizes leave over."""

import pytest
import torch

from openllama.ops import linear_swiglu, linear_swiglu_backward_

from .contract import BF16, F64, PRODUCTS, on_hopper
from .rule import laid_out, random
from .test_backend import python

# (tokens, hidden, intermediate): a tile is 128 tokens by 128 or 256 columns, 64 deep; two blocks share a cluster
SHAPES = (
    (1, 16, 16),
    (127, 64, 128),
    (128, 80, 144),
    (129, 48, 272),
    (256, 128, 256),
    (257, 192, 384),
    (700, 784, 1040),
    (3000, 256, 512),
    (1500, 64, 4096),
)


class Inputs:
    def __init__(self, tokens, hidden, intermediate, dtype=BF16, device="cuda", seed=0):
        def tensor(rows, columns, number, scale=1.0):
            return random((rows, columns), dtype, device, seed + number, scale)

        self.x, self.dout = tensor(tokens, hidden, 0), tensor(tokens, hidden, 1)
        self.w_gate_up = tensor(2 * intermediate, hidden, 2, 2 * hidden**-0.5)
        self.w_down = tensor(hidden, intermediate, 3, hidden**-0.5)

    def exact(self):
        """(gate_up, act) and (dgate_up, act) of the rounded gate_up, in float64."""
        gate_up = (self.x.double() @ self.w_gate_up.double().t()).requires_grad_()
        rounded = gate_up.detach().to(self.x.dtype).double().requires_grad_()
        gate, up = rounded.chunk(2, dim=1)
        act = torch.nn.functional.silu(gate) * up
        dact = self.dout.double() @ self.w_down.double()
        return gate_up.detach(), act.detach(), torch.autograd.grad(act, rounded, dact)[0]


def close(ours, exact, roundings):
    """To so many roundings of each element or, where sums cancel, to fp32's of the largest."""
    eps = 1e-12 if ours.dtype == F64 else torch.finfo(ours.dtype).eps
    allowed = roundings * eps * exact.abs() + max(1e-5, 8 * eps if roundings > 1 else 0) * exact.abs().max()
    assert ours.isfinite().all() and ((ours.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("where, dtype, backend", PRODUCTS)
def test_against_float64(where, dtype, backend, shape):
    inputs = Inputs(*shape, dtype=dtype, device=where)
    exact_gate_up, exact_act, exact_gradient = inputs.exact()
    gate_up, act = linear_swiglu(inputs.x, [inputs.w_gate_up], backend=backend)
    close(gate_up, exact_gate_up, 1)
    close(act, exact_act, 2)
    apart, _ = linear_swiglu(inputs.x, inputs.w_gate_up.chunk(2), backend=backend)
    close(apart, exact_gate_up, 1)
    gate_up = exact_gate_up.to(dtype)
    for with_act in (True, False):
        given = gate_up.clone()
        act = linear_swiglu_backward_(inputs.dout, inputs.w_down, given, with_act, backend=backend)
        close(given, exact_gradient, 3)
        assert act is None if not with_act else True
        if act is not None:
            close(act, exact_act, 2)


@on_hopper
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_written_and_none_beside(shape):
    inputs = Inputs(*shape)
    tokens, _, intermediate = shape
    wide = torch.full((tokens + 2, 2 * intermediate), float("nan"), dtype=BF16, device="cuda")
    narrow = torch.full((tokens + 2, intermediate), float("nan"), dtype=BF16, device="cuda")
    gate_up, act = wide[1:-1], narrow[1:-1]
    w_gate, w_up = inputs.w_gate_up.chunk(2)
    ops = torch.ops.openllama
    ops.linear_swiglu_fwd(inputs.x, w_gate, w_up, gate_up, act)
    assert gate_up.isfinite().all() and act.isfinite().all()
    act.fill_(float("nan"))
    ops.linear_swiglu_bwd_(inputs.dout, inputs.w_down, gate_up, act)
    assert gate_up.isfinite().all() and act.isfinite().all()
    for t in (wide, narrow):
        assert t[0].isnan().all() and t[-1].isnan().all()


@on_hopper
@pytest.mark.parametrize(
    "layout", ("slice", "inner slice", "misaligned", "every other", "transposed", "expanded")
)
def test_layouts(layout):
    """What TMA can't read goes to the reference."""
    inputs = Inputs(1200, 128, 256)
    x, w, dout, w_down = (
        laid_out(t, layout) for t in (inputs.x, inputs.w_gate_up, inputs.dout, inputs.w_down)
    )
    gate_up, act = linear_swiglu(x, [w])
    theirs = linear_swiglu(x.contiguous(), [w.contiguous()], backend="reference")
    for a, b in zip((gate_up, act), theirs):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    theirs = theirs[0]
    linear_swiglu_backward_(dout, w_down, gate_up)
    linear_swiglu_backward_(dout.contiguous(), w_down.contiguous(), theirs, backend="reference")
    torch.testing.assert_close(gate_up, theirs, rtol=5e-2, atol=5e-2)


@on_hopper
def test_nan_stays_in_its_token():
    inputs = Inputs(1100, 128, 256)
    inputs.x[300, 5] = inputs.dout[301, 7] = float("nan")
    gate_up, act = linear_swiglu(inputs.x, [inputs.w_gate_up], backend="cuda")
    for t in (gate_up, act):
        assert t[300].isnan().all() and t.isnan().sum() == t.shape[1]
    linear_swiglu_backward_(inputs.dout, inputs.w_down, gate_up, backend="cuda")
    assert gate_up.isnan().all(dim=1).nonzero().flatten().tolist() == [300, 301]
    assert gate_up.isnan().sum() == 2 * gate_up.shape[1]


@on_hopper
def test_runs_are_bitwise_equal():
    inputs = Inputs(2500, 512, 1408)
    runs = []
    for _ in range(20):
        gate_up, act = linear_swiglu(inputs.x, [inputs.w_gate_up], backend="cuda")
        kept = gate_up.clone()
        again = linear_swiglu_backward_(inputs.dout, inputs.w_down, gate_up, backend="cuda")
        assert again is not None and torch.equal(again, act)  # act has the same bits when made again
        runs.append((kept, act, gate_up))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))


@on_hopper
def test_offsets_past_32_bits():
    tokens, intermediate = 66_000, 17_000 // 16 * 16
    free = torch.cuda.mem_get_info()[0]
    assert 2 * tokens * intermediate > 2**31 and free > 16 * 2**30
    inputs = Inputs(tokens, 32, intermediate)
    gate_up, act = linear_swiglu(inputs.x, [inputs.w_gate_up], backend="cuda")
    last = slice(tokens - 130, tokens)
    theirs = linear_swiglu(inputs.x[last], [inputs.w_gate_up], backend="reference")
    torch.testing.assert_close((gate_up[last], act[last]), theirs, rtol=2e-2, atol=2e-2)
    linear_swiglu_backward_(inputs.dout, inputs.w_down, gate_up, False, backend="cuda")
    linear_swiglu_backward_(inputs.dout[last], inputs.w_down, theirs[0], backend="reference")
    torch.testing.assert_close(gate_up[last], theirs[0], rtol=5e-2, atol=5e-2)


@on_hopper
def test_few_tokens_are_left_to_products_of_smaller_tiles(monkeypatch):
    inputs, calls = Inputs(512, 64, 128), []

    def linears(x, *_, **__):
        calls.append(x)
        return x.new_zeros(len(x), 256)

    monkeypatch.setattr("openllama.kernels.linear_swiglu.linears", linears)
    linear_swiglu(inputs.x, [inputs.w_gate_up])
    assert len(calls) == 1
    inputs = Inputs(1024, 64, 128)
    linear_swiglu(inputs.x, [inputs.w_gate_up])
    assert len(calls) == 1


def test_no_tokens(device):
    x, w = torch.ones(0, 32, device=device), torch.ones(64, 32, device=device)
    gate_up, act = linear_swiglu(x, [w])
    assert gate_up.shape == (0, 64) and act.shape == (0, 32)
    act = linear_swiglu_backward_(x, torch.ones(32, 32, device=device), gate_up)
    assert act is not None and act.shape == (0, 32)


X, W, DOWN, WIDE = torch.ones(3, 8), torch.ones(12, 8), torch.ones(8, 6), torch.ones(3, 12)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: linear_swiglu(X[0], [W]), ValueError, r"x: got shape \(8,\), takes \(tokens, hidden\)"),
        (lambda: linear_swiglu(X.int(), [W]), TypeError, "x: got torch.int32"),
        (lambda: linear_swiglu(X, [W.double()]), TypeError, r"weights\[0\]: got torch.float64, takes x's"),
        (lambda: linear_swiglu(X, [W, W[:6]]), ValueError, r"weights: got shapes \[\(12, 8\), \(6, 8\)\], takes one"),
        (lambda: linear_swiglu(X, [W[:, :7]]), ValueError, r"takes one \(2 \* intermediate, 8\) or two"),
        (lambda: linear_swiglu(X, [W[:11]]), ValueError, "weights: got shapes"),
        (lambda: linear_swiglu(X, [W], backend="cuda"), ValueError, "linear_swiglu can't run on 'cuda' here"),
        (lambda: linear_swiglu(X, [W], backend="triton"), ValueError, "linear_swiglu has no triton kernel"),
        (lambda: linear_swiglu_backward_(X, DOWN[:7], WIDE), ValueError, r"dout, w_down: got shapes"),
        (lambda: linear_swiglu_backward_(X, DOWN, WIDE[:2]), ValueError, r"gate_up: got shape \(2, 12\), takes"),
        (lambda: linear_swiglu_backward_(X, DOWN, WIDE.bfloat16()), TypeError, "gate_up: got torch.bfloat16"),
        (lambda: linear_swiglu_backward_(X, DOWN, torch.ones(12, 3).t()), ValueError, "gate_up: got strides"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@on_hopper
def test_a_forced_kernel_says_what_it_takes():
    inputs = Inputs(256, 68, 128)
    with pytest.raises(ValueError, match=r"can't run on 'cuda' here: .*\(256, 68\).*multiples of"):
        linear_swiglu(inputs.x, [inputs.w_gate_up], backend="cuda")
    with pytest.raises(ValueError, match=r"no torch\.float32 kernel"):
        linear_swiglu(inputs.x.float(), [inputs.w_gate_up.float()], backend="cuda")


@on_hopper
def test_a_thread_that_has_not_used_the_gpu_yet():
    """TMA's descriptors are made by the driver, which needs a context in the thread; autograd's have none at first."""
    code = """
import threading, torch
from openllama.ops import linear_swiglu
x, w = torch.ones(128, 64, device="cuda").bfloat16(), torch.ones(256, 64, device="cuda").bfloat16()
thread = threading.Thread(target=lambda: print(linear_swiglu(x, [w], backend="cuda")[1].isfinite().all().item()))
thread.start()
thread.join()
"""
    result = python(code)
    assert result.stdout == "True\n", result.stderr
