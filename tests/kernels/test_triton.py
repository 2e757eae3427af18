"""The Triton twins of the differentiable ops, against the native CPU kernels."""

import pytest
import torch

from .contract import BF16, F16, F32
from .rule import near, random
from .twins import DEVICE, INTERPRETED, kernels, on, only_compiled, run_interpreted, twin

DTYPES = (F32, BF16) if INTERPRETED else (F32, BF16, F16)
SIZES = (1, 7, 41, 123, 128, 1000)
NAN, INF = float("nan"), float("inf")

# Which results of an op have its inputs' dtype.
HALVES = {
    "rms_norm_fwd": (0, 1), "rms_norm_bwd": (0,), "rotary": (0,), "swiglu_fwd": (0,), "swiglu_bwd": (0,),
    "cross_entropy_fwd": (), "cross_entropy_bwd": (0,),
}  # fmt: skip


def test_in_the_interpreter():
    run_interpreted(__file__)


def native(op, *arguments):
    """The native CPU kernel's results; for fp16, which it lacks, those of fp32 rounded."""
    if op == "rms_norm_fwd" and arguments[0].dtype == F16 and arguments[1] is not None:
        x, residual, *more = arguments  # whose sum is rounded before it is normed
        y, _, rstd = native(op, x + residual, None, *more)
        return [y, x + residual, rstd]
    half = any(isinstance(a, torch.Tensor) and a.dtype == F16 for a in arguments)
    wide = [a.float() if isinstance(a, torch.Tensor) and a.dtype == F16 else a for a in arguments]
    results = getattr(torch.ops.openllama, op)(*wide)
    results = results if isinstance(results, tuple) else (results,)
    return [r.to(F16) if half and i in HALVES[op] else r for i, r in enumerate(results)]


def dense(shape, dtype, seed, scale=1.0):
    return random(shape, dtype, "cpu", seed, scale)


def sliced(shape, dtype, seed, scale=1.0, offset=3, more=8):
    """Rows that are a slice of wider ones, with NaN between them."""
    values = dense(shape, dtype, seed, scale)
    buffer = values.new_full((*shape[:-1], shape[-1] + more), NAN)
    return buffer[..., offset : offset + shape[-1]].copy_(values)


def all_near(ours, theirs, ulps, name="", floor=0.0):
    for i, (o, t) in enumerate(zip(ours, theirs)):
        near(o.cpu(), t, ulps, f"{name} [{i}]", floor)


@kernels
class TestRmsNorm:
    dtypes, sizes = DTYPES, SIZES

    def check(self, rows, hidden, dtype, weight_dtype=F32, laid=dense, need=(True, True)):
        ops, weight = twin("rms_norm"), dense((hidden,), weight_dtype, 1)
        x, dy, *more = (laid((rows, hidden), dtype, seed) for seed in (2, 3, 4, 5))
        for residual, dh in ((None, None), more):
            y, h, rstd = native("rms_norm_fwd", x, residual, weight, 1e-5)
            all_near(ops.rms_norm_fwd(*on(x, residual, weight), 1e-5), (y, h, rstd), 2, "forward")
            arguments = (dy, dh, x if residual is None else h, weight, rstd, *need)
            expected = native("rms_norm_bwd", *arguments)
            terms = (dy * weight * rstd[:, None]).abs().max().item()  # which nearly cancel where hidden is 1
            all_near(ops.rms_norm_bwd(*on(*arguments)), expected, 8, "backward", floor=terms)

    def test_sizes(self, dtype, size):
        self.check(5, size, dtype)
        self.check(3, size, dtype, dtype, sliced)

    @pytest.mark.parametrize("hidden", (520, 768, 1536, pytest.param(5120, marks=only_compiled)))
    def test_rows_of_two_tiles(self, dtype, hidden):
        self.check(1, hidden, dtype)
        self.check(2, hidden, dtype, dtype, sliced)

    def test_two_tiles_that_backward_reads_again(self, dtype):
        self.check(2, 8200, dtype, need=(True, False))

    def test_many_short_rows(self, dtype):
        self.check(77, 64, dtype)

    @pytest.mark.parametrize("need", ((True, False), (False, True), (False, False)))
    @pytest.mark.parametrize("hidden, widest", ((123, 16_384), (123, 64), (768, 16_384)))
    def test_only_what_is_needed(self, need, hidden, widest, monkeypatch):
        monkeypatch.setattr(twin("rms_norm"), "_WIDEST", widest)
        self.check(5, hidden, F32, need=need)

    def test_rows_too_wide_for_registers(self, dtype, monkeypatch):
        monkeypatch.setattr(twin("rms_norm"), "_WIDEST", 64)  # pieces of 32
        self.check(3, 123, dtype, F32, sliced)
        self.check(3, 200, dtype, dtype)

    def test_programs_that_take_several_rows(self, monkeypatch):
        monkeypatch.setattr(twin("rms_norm"), "processors", lambda device: 1)
        self.check(19, 1000, F32)
        self.check(19, 768, F32)
        self.check(100, 64, F32)
        monkeypatch.setattr(twin("rms_norm"), "_WIDEST", 64)
        self.check(7, 123, F32)

    @pytest.mark.parametrize("shape", ((0, 5), (3, 0), (0, 0)))
    def test_empty(self, shape):
        ops, x, weight = (
            twin("rms_norm"),
            torch.zeros(shape, device=DEVICE),
            torch.ones(shape[1], device=DEVICE),
        )
        y, h, rstd = ops.rms_norm_fwd(x, x, weight, 1e-5)
        assert y.shape == h.shape == shape and rstd.shape == shape[:1]
        dx, dweight = ops.rms_norm_bwd(x, x, x, weight, rstd, True, True)
        assert dx.shape == shape and dweight.shape == shape[1:] and not dweight.count_nonzero()

    def test_two_runs_are_equal(self):
        x, weight = on(dense((300, 123), BF16, 0), dense((123,), F32, 1))
        rstd = twin("rms_norm").rms_norm_fwd(x, None, weight, 1e-5)[2]
        first, second = (
            twin("rms_norm").rms_norm_bwd(x, None, x, weight, rstd, True, True) for _ in range(2)
        )
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@kernels
class TestRotary:
    dtypes = DTYPES

    @staticmethod
    def tables(half):
        return dense((50, half), F32, 7), dense((50, half), F32, 8)

    def check(self, x, half, rotated, interleaved, inverse, positions=None, offset=0):
        arguments = (*self.tables(half), positions, offset, rotated, interleaved, inverse)
        (expected,) = native("rotary", x, *arguments)
        into, *arguments = on(x, *arguments)
        ours = twin("rotary").rotary(into, *arguments)
        assert ours.is_contiguous()
        assert twin("rotary").rotary_(into, *arguments) is None
        all_near((ours, into), (expected, expected), 2)

    @pytest.mark.parametrize("interleaved", (False, True))
    @pytest.mark.parametrize("inverse", (False, True))
    @pytest.mark.parametrize("head_dim, half", ((8, 4), (14, 7), (128, 64), (80, 16), (14, 3), (2, 1)))
    def test_head_dims(self, head_dim, half, interleaved, inverse):
        positions = torch.tensor([3, 0, 49, 7, 3], dtype=torch.int32)
        self.check(dense((5, 6, head_dim), F32, 1), half, 4, interleaved, inverse, positions)

    @pytest.mark.parametrize("heads, rotated", ((1, 1), (3, 1), (40, 33), (5, 0)))
    def test_heads(self, dtype, heads, rotated):
        self.check(dense((11, heads, 64), dtype, 1), 32, rotated, False, False, offset=2)
        self.check(dense((11, heads, 64), dtype, 1), 24, rotated, True, False, offset=2)

    @pytest.mark.parametrize("more", (8, 5))
    def test_tokens_that_are_a_slice_of_wider_ones(self, dtype, more):
        self.check(sliced((7, 6 * 16), dtype, 1, more=more).unflatten(1, (6, 16)), 8, 4, False, True)

    @pytest.mark.parametrize("outside", (-1, 50, 2**31 - 1, -(2**31)))
    def test_a_position_outside_the_tables_spoils_only_its_token(self, outside):
        x, tables = dense((5, 3, 8), F32, 1), self.tables(4)
        positions = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32)
        (expected,) = native("rotary", x, *tables, positions, 0, 2, False, False)
        positions[2] = outside
        ours = twin("rotary").rotary(*on(x, *tables, positions), 0, 2, False, False).cpu()
        assert ours[2, :2].isnan().all() and torch.equal(ours[2, 2], x[2, 2])
        expected[2, :2] = ours[2, :2] = 0
        near(ours, expected, 2)

    @pytest.mark.parametrize("shape", ((0, 3, 8), (4, 0, 8)))
    def test_empty(self, shape):
        x, tables = torch.zeros(shape, device=DEVICE), on(*self.tables(4))
        assert twin("rotary").rotary(x, *tables, None, 0, 0, False, False).shape == shape
        twin("rotary").rotary_(x, *tables, None, 0, 0, False, False)


@kernels
class TestSwiglu:
    dtypes, sizes = DTYPES, (*SIZES, 2500)

    def test_sizes(self, dtype, size):
        for laid in (dense, sliced):
            gate_up, dact = laid((3, 2 * size), dtype, 1, 3.0), laid((3, size), dtype, 2)
            (act,), (dgate_up,) = native("swiglu_fwd", gate_up), native("swiglu_bwd", dact, gate_up)
            to_act, to_grad = on(dact, gate_up)
            near(twin("swiglu").swiglu_fwd(to_grad).cpu(), act, 4)
            near(twin("swiglu").swiglu_bwd(to_act, to_grad).cpu(), dgate_up, 4)
            assert twin("swiglu").swiglu_bwd_(to_act, to_grad) is None
            all_near((to_act, to_grad), (act, dgate_up), 4)

    def test_far_from_zero(self):
        gate_up = torch.tensor([[-200.0, -90, 90, 200, 1, 1, 1, 1]])
        dgate_up = twin("swiglu").swiglu_bwd(*on(torch.ones(1, 4), gate_up)).cpu()
        near(dgate_up, torch.tensor([[0.0, 0, 1, 1, 0, 0, 90, 200]]), 2)

    @pytest.mark.parametrize("shape", ((0, 6), (3, 0)))
    def test_empty(self, shape):
        gate_up = torch.zeros(shape, device=DEVICE)
        act = twin("swiglu").swiglu_fwd(gate_up)
        assert act.shape == (shape[0], shape[1] // 2)
        assert twin("swiglu").swiglu_bwd(act, gate_up).shape == shape
        twin("swiglu").swiglu_bwd_(act, gate_up)


PLAIN = (-100, 0.0, 0.0)  # ignore_index, softcap, z_loss


@kernels
class TestCrossEntropy:
    dtypes, sizes = DTYPES, SIZES

    @staticmethod
    def make(rows, vocab, dtype=F32, laid=sliced):
        labels = torch.arange(rows) * 37 % vocab
        labels[rows // 2] = -100
        return laid((rows, vocab), dtype, 1, 4.0), labels

    def check(self, logits, labels, options=PLAIN, weighted=True):
        ops = twin("cross_entropy")
        weights = dense((len(logits),), F32, 9) if weighted else torch.ones(len(logits))
        loss, lse = native("cross_entropy_fwd", logits, labels, *options)
        (grad,) = native("cross_entropy_bwd", weights, logits, labels, lse, *options)
        floor = lse.abs().max().item()
        x, y, dloss = on(logits, labels, weights)
        ours, our_lse = ops.cross_entropy_fwd(x, y, *options)
        all_near((ours, our_lse.sum(1)), (loss, lse.sum(1)), 4, floor=floor)
        near(ops.cross_entropy_bwd(dloss, x, y, our_lse, *options).cpu(), grad, 8)
        for combined in (False, True):
            into = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)
            if combined:
                ours = ops.cross_entropy_fwd_bwd_(into, y, dloss if weighted else None, *options)
                near(ours.cpu(), loss, 4, floor=floor)
            else:
                assert ops.cross_entropy_bwd_(dloss, into, y, our_lse, *options) is None
            near(into.cpu(), grad, 8)
            assert not into.cpu()[labels == options[0]].count_nonzero()

    def test_sizes(self, dtype, size):
        self.check(*self.make(4, size, dtype), weighted=False)
        self.check(*self.make(4, size, dtype, dense))

    @pytest.mark.parametrize("softcap, z_loss", ((30.0, 0.0), (0.0, 1e-2), (5.0, 1e-2)))
    def test_options(self, dtype, softcap, z_loss):
        logits, labels = self.make(4, 123, dtype)
        self.check(logits, labels, (-100, softcap, z_loss))
        self.check(logits, labels.abs(), (100, softcap, z_loss))

    def test_rows_that_start_anywhere(self, dtype):
        for more in range(8):
            logits = sliced((3, 50), dtype, 1, 4.0, offset=0, more=more)
            self.check(logits, torch.tensor([0, 49, 7]))

    @pytest.mark.parametrize("label", (41, -1, 2**40))
    def test_an_impossible_label_gives_nan(self, label):
        logits, labels = self.make(5, 41)
        expected = native("cross_entropy_fwd", logits, labels, *PLAIN)[0]
        labels[1] = label
        logits, labels, dloss = on(logits, labels, torch.ones(5))
        loss, lse = twin("cross_entropy").cross_entropy_fwd(logits, labels, *PLAIN)
        dlogits = twin("cross_entropy").cross_entropy_bwd(dloss, logits, labels, lse, *PLAIN)
        both = twin("cross_entropy").cross_entropy_fwd_bwd_(logits, labels, None, *PLAIN)
        assert lse[1].isnan().all()
        for losses, gradient in ((loss, dlogits), (both, logits)):
            assert losses[1].isnan() and gradient[1].isnan().all()
            near(losses[[0, 2, 3, 4]].cpu(), expected[[0, 2, 3, 4]], 4, floor=10)
            assert gradient[[0, 2, 3, 4]].isfinite().all()

    @pytest.mark.parametrize("value", (NAN, INF))
    @pytest.mark.parametrize("column", (0, 5, 40))
    def test_nan_and_infinity_stay_in_their_row(self, value, column):
        logits, labels = self.make(5, 41)
        logits[0, column] = value
        logits[2] = value  # which is ignored
        logits, labels = on(logits, labels)
        loss, lse = twin("cross_entropy").cross_entropy_fwd(logits, labels, *PLAIN)
        both = twin("cross_entropy").cross_entropy_fwd_bwd_(logits, labels, None, *PLAIN)
        assert not any(t[0].isfinite().all() for t in (loss, both, logits))
        assert all(t[1:].isfinite().all() for t in (loss, both, logits))
        assert loss[2] == 0 and not logits[2].count_nonzero() and not lse[2].count_nonzero()

    def test_masked_logits(self):
        logits, labels = self.make(5, 41)
        labels = labels.clamp(max=19)
        logits[:, 20:] = -INF
        self.check(logits, labels)
        logits[0] = -INF
        assert not twin("cross_entropy").cross_entropy_fwd(*on(logits, labels), *PLAIN)[0][0].isfinite()

    @pytest.mark.parametrize("top", (1e4, -1e4, 3e38))
    def test_large_logits(self, top):
        logits, labels = self.make(5, 41)
        logits += top
        loss, lse = native("cross_entropy_fwd", logits, labels, *PLAIN)
        (grad,) = native("cross_entropy_bwd", torch.ones(5), logits, labels, lse, *PLAIN)
        logits, labels = on(logits, labels)
        near(
            twin("cross_entropy").cross_entropy_fwd_bwd_(logits, labels, None, *PLAIN).cpu(),
            loss,
            4,
            floor=10,
        )
        near(logits.cpu(), grad, 8)

    def test_empty(self):
        ops, logits = twin("cross_entropy"), torch.zeros(0, 41, device=DEVICE)
        labels = torch.zeros(0, dtype=torch.int64, device=DEVICE)
        loss, lse = ops.cross_entropy_fwd(logits, labels, *PLAIN)
        assert loss.shape == (0,) and lse.shape == (0, 2)
        assert ops.cross_entropy_bwd(loss, logits, labels, lse, *PLAIN).shape == (0, 41)
        assert ops.cross_entropy_fwd_bwd_(logits, labels, None, *PLAIN).shape == (0,)
