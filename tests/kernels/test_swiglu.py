"""swiglu: silu(gate) * up on a packed [gate | up] row."""

import functools

import pytest
import torch
import torch.nn.functional as F

from openllama.ops import swiglu, swiglu_backward_

from .contract import BF16, F16, F32, F64, Contract
from .rule import assert_error_rule, ends, random, run


class TestSwiglu(Contract):
    sizes = (41, 1, 7, 123, 1024, 3584, 5120, 8192)  # intermediate
    compilers = ("aot_eager", "inductor")

    def make(self, rows, size, dtype, device, seed=0):
        return [random((rows, 2 * size), dtype, device, seed, scale=3)], ()

    def op(self, gate_up, backend=None):
        return swiglu(gate_up, backend=backend)

    def eager(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def raw(self, device, dtype):
        if dtype == F64 or (device == "cpu" and dtype == F16):
            pytest.skip("the raw op has no such kernel")
        wide = random((5, 40), dtype, device, 0)
        ops = torch.ops.openllama
        return [
            (ops.swiglu_fwd.default, (wide[:, 3:17],)),
            (ops.swiglu_bwd.default, (wide[:, 9:16], wide[:, 3:17])),
            (ops.swiglu_bwd_.default, (wide[:, 30:37].clone(), wide[:, 3:17].clone())),
        ]

    def fuzz_size(self, rng):
        return rng.choice((1, 2, 3, 8, 15, 16, 17, 64, 100, 257))


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_saturated_gates(device, dtype):
    """Both ends of the sigmoid, where exp overflows or vanishes, and the steep part between."""
    gate = torch.linspace(-120, 120, 2001, dtype=dtype, device=device)
    gate_up = torch.cat([gate, random((2001,), dtype, device, 1)])[None]
    assert_error_rule(swiglu, TestSwiglu().eager, [gate_up])


@pytest.mark.parametrize("low, high", ((-87, -60), (-60, -20), (-20, -1)))
def test_small_results_keep_their_relative_accuracy(low, high):
    """exp(-|gate|) is a small number: its error counts relative to itself, not to the largest gate."""
    gate = torch.linspace(low, high, 4001)
    ours = swiglu(torch.cat([gate, torch.ones(4001)])[None])[0].double()
    exact = F.silu(gate.double())
    assert ((ours - exact) / exact).abs().max() < 4 * torch.finfo(F32).eps


def test_nan_and_infinity_propagate(device):
    for value in (float("nan"), float("inf")):
        gate_up = torch.ones(3, 14, device=device)
        gate_up[1, 2], gate_up[2, 9] = value, value
        act = swiglu(gate_up)
        assert not act[1, 2].isfinite() and not act[2, 2].isfinite() and act.isfinite().sum() == 19


def test_any_leading_shape(device):
    gate_up = random((2, 3, 5, 14), F32, device, 0)
    assert torch.equal(swiglu(gate_up), swiglu(gate_up.view(30, 14)).view(2, 3, 5, 7))
    assert swiglu(gate_up[0, 0, 0]).shape == (7,) and swiglu(gate_up[..., :0]).shape == (2, 3, 5, 0)


@pytest.mark.parametrize(
    "gate_up, error, message",
    [
        (torch.zeros(4, 7), ValueError, r"gate_up: got shape \(4, 7\), takes \(\.\.\., 2 \* intermediate\)"),
        (torch.zeros(()), ValueError, r"gate_up: got shape \(\)"),
        (torch.zeros(4, 8, dtype=torch.int32), TypeError, "gate_up: got torch.int32, takes float32"),
        ([1.0, 2.0], TypeError, "gate_up: got list, takes a tensor"),
    ],
)
def test_bad_input_is_named(gate_up, error, message):
    with pytest.raises(error, match=message):
        swiglu(gate_up)


@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64))
@pytest.mark.parametrize("rows, intermediate", ((5, 7), (3, 64), (0, 8), (2, 0), (33, 1000)))
def test_backward_in_place(device, dtype, rows, intermediate):
    """dact becomes act and gate_up its gradient, to the bit of what the two other ops give; around them nothing changes."""
    wide_gate_up = random((rows, 2 * intermediate + 16), dtype, device, 0, scale=3)
    wide_dact = random((rows, intermediate + 16), dtype, device, 1)
    gate_up, dact = wide_gate_up[:, 8 : 8 + 2 * intermediate], wide_dact[:, 8 : 8 + intermediate]
    (act,), (dgate_up,) = run(swiglu, [gate_up], douts=[dact])
    before = wide_gate_up.clone(), wide_dact.clone()
    swiglu_backward_(dact, gate_up)
    assert torch.equal(dact, act) and torch.equal(gate_up, dgate_up)
    for wide, old in zip((wide_gate_up, wide_dact), before):
        assert torch.equal(wide[:, :8], old[:, :8]) and torch.equal(wide[:, -8:], old[:, -8:])


def test_backward_in_place_is_seen_by_autograd():
    gate_up = random((3, 14), F32, "cpu", 0).requires_grad_() * 1
    act = swiglu(gate_up)
    swiglu_backward_(torch.ones(3, 7), gate_up)
    with pytest.raises(RuntimeError, match=r"modified.*inplace"):
        act.sum().backward()


@pytest.mark.parametrize(
    "dact, gate_up, error, message",
    [
        (torch.zeros(4, 7), torch.zeros(4, 15), ValueError, r"gate_up: got shape \(4, 15\)"),
        (torch.zeros(4, 6), torch.zeros(4, 14), ValueError, r"dact: got shape \(4, 6\), takes \(4, 7\)"),
        (torch.zeros(4, 7).half(), torch.zeros(4, 14), TypeError, "dact: got torch.float16"),
        (torch.zeros(7, 4).T, torch.zeros(4, 14), ValueError, r"dact: got strides \(1, 4\)"),
        (torch.zeros(4, 7), torch.zeros(1, 14).expand(4, 14), ValueError, r"gate_up: got strides \(0, 1\)"),
    ],
)
def test_backward_in_place_names_bad_input(dact, gate_up, error, message):
    before = dact.clone()
    with pytest.raises(error, match=message):
        swiglu_backward_(dact, gate_up)
    assert torch.equal(dact, before)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_more_than_2_to_the_31_elements(backend):
    rows, intermediate = 70_000, 16_384  # gate_up: 2.3e9 elements, 4.6 GB
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    gate_up = torch.ones(rows, 2 * intermediate, dtype=BF16, device="cuda")
    gate_up[0], gate_up[-1] = random((2, 2 * intermediate), BF16, "cuda", 0)
    dact = torch.ones(rows, intermediate, dtype=BF16, device="cuda")
    op = functools.partial(swiglu, backend=backend)
    (alone,), (alone_grad,) = run(op, [ends(gate_up)], douts=[ends(dact)])
    (act,), (grad,) = run(op, [gate_up], douts=[dact])
    assert torch.equal(ends(act), alone) and torch.equal(ends(grad), alone_grad)
    swiglu_backward_(dact, gate_up, backend=backend)
    assert torch.equal(ends(dact), alone) and torch.equal(ends(gate_up), alone_grad)
