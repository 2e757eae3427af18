"""adamw with state in 8 and 16 bits: codes, random bits, remainders, and what the op makes of them."""

from itertools import chain, product

import numpy as np
import pytest
import torch

from openllama.kernels import adamw_forms as forms
from openllama.kernels import backend as backends
from openllama.ops import adamw

from .contract import BF16, F16, F32
from .rule import near, random
from .test_adamw import HYPER, SHAPES, Run, same

U8, I16 = torch.uint8, torch.int16
MOMENTS, MASTERS = (F32, BF16, U8), (F32, I16, None)

#: (params' dtype, moments' dtype, masters' dtype) of every form that has bits of its own.
LOW = [
    *(
        (BF16, moment, master)
        for moment, master in product(MOMENTS, MASTERS)
        if (moment, master) != (F32, F32)
    ),
    *((dtype, moment, F32) for dtype in (F32, F16) for moment in (BF16, U8)),
]


@pytest.fixture(params=LOW, ids=lambda f: "-".join(str(d).removeprefix("torch.") for d in f))
def form(request):
    dtype, moment, master = request.param
    return {"dtype": dtype, "moment": moment, "master": master}


def moments_of(run):
    """Both moments of each tensor in fp32."""
    scales = run.scales or [(None, None)] * len(run.params)
    return [
        [forms.decode_moment(t.reshape(-1), s[row], row == 1) for t, s in zip(tensors, scales)]
        for row, tensors in enumerate((run.exp_avgs, run.exp_avg_sqs))
    ]


def weights_of(run):
    """The exact weights in fp32."""
    if run.masters and run.masters[0].dtype == I16:
        return [forms.join_master(p, r) for p, r in zip(run.params, run.masters)]
    return [w.float() for w in run.masters or run.params]


# ---------------------------------------------------------------- bits


def mix(x):
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


@pytest.mark.parametrize("seed, step", ((0, 1), (2**32 - 1, 1000), (42, 2**24)))
@pytest.mark.parametrize("first", (0, 2**32 - 7, 5 * 2**33 + 11))
def test_random_bits_are_those_of_uint32(device, seed, step, first):
    e = first + np.arange(20, dtype=np.int64)
    one = np.ones(20, np.uint32)  # arrays wrap without a warning
    key = mix(mix(one * np.uint32(seed) + np.uint32(0x9E3779B9)) + np.uint32(step))
    golden = np.uint32(0x9E3779B9)
    x = (e & 0xFFFFFFFF).astype(np.uint32) * golden + mix(key + (e >> 32).astype(np.uint32))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    mean = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    expected = [word >> np.uint32(16) for word in (mean * golden * golden, mean, mean * golden)]
    steps = step, torch.tensor(step, device=device)
    for ours in (forms.random_bits(first, 20, seed, s, torch.device(device)) for s in steps):
        assert all(o.tolist() == e.tolist() for o, e in zip(ours, expected))


def test_random_bits_are_even_and_unrelated():
    """Means and correlations of a million are within 5 standard deviations: of the three, of neighbours, of steps."""
    count = 2**20
    one, two = (torch.stack(forms.random_bits(0, count, 3, step, torch.device("cpu"))) for step in (7, 8))
    rows = torch.cat(
        (one, two, one[:, 1 : 2**20].new_zeros(0, count), one.roll(1, 1), one.roll(256, 1))
    ).double()
    rows = (rows - 32767.5) / (65536 / 12**0.5)
    assert rows.mean(1).abs().max() < 5 / count**0.5
    assert (rows.square().mean(1) - 1).abs().max() < 5 / count**0.5
    related = rows @ rows.T / count - torch.eye(len(rows))
    assert related.abs().max() < 5 / count**0.5


def special(device="cpu"):
    """fp32 of every exponent, subnormal, ties of bf16, infinite, NaN."""
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    ties = bits[:512] & ~0xFFFF | 0x8000
    ends = torch.tensor(
        [0, -(2**31), 1, 0x7F7FFFFF, 0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001]
    )
    return torch.cat((bits, ties, ends)).to(torch.int32).view(F32).to(device)


def test_a_master_is_split_and_joined_exactly(device):
    x = special(device)
    param, remainder = forms.split_master(x)
    joined = forms.join_master(param, remainder)
    assert torch.equal(joined.view(torch.int32)[~x.isnan()], x.view(torch.int32)[~x.isnan()])
    assert joined.isnan().equal(x.isnan()) and param.isnan().equal(x.isnan())
    nearest = x.bfloat16()
    finite = nearest.isfinite() & param.isfinite()
    assert ((param.double() - x).abs() <= (nearest.double() - x).abs())[finite].all()
    assert (param != nearest)[~x.isnan()].any(), "there are ties"


def test_rounding_to_bf16_is_unbiased_to_the_last_bit():
    """Over all 65,536 random bits the mean is the number itself."""
    x = special()
    x = x[x.isfinite() & (x.abs() < 1e38)][::16].double()
    total = torch.zeros_like(x)
    for bits in torch.arange(2**16).split(64):
        total += forms.round_to_bf16(x.float().repeat(64, 1), bits[:, None]).double().sum(0)
    assert torch.equal(total / 2**16, x)
    rest = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert (
        forms.round_to_bf16(rest, 0xFFFF).equal(rest.bfloat16())
        or forms.round_to_bf16(rest, 0xFFFF)[2].isnan()
    )
    assert torch.equal(forms.round_to_bf16(rest, 0xFFFF)[:2], rest[:2].bfloat16())


@pytest.mark.parametrize("square", (False, True))
def test_8_bit_codes_are_unbiased(square):
    """Over evenly spread random bits the mean is the number, to a small part of the codes' spacing."""
    x = random((1000,), F32, "cpu", 1).abs() ** 3 if square else random((1000,), F32, "cpu", 1)
    total, low, high = torch.zeros(1000).double(), x + torch.inf, x - torch.inf
    for bits in range(0, 2**16, 2**7):
        values = forms.decode_moment(*forms.encode_moment(x, U8, square, bits), square)
        total, low, high = total + values, low.minimum(values), high.maximum(values)
    spacing = (high - low).maximum(0.02 * x.abs())  # some are codes, as the largest of a block is
    assert ((total / 2**9 - x).abs() / spacing).max() < 2**-8
    assert (spacing / x.abs())[x.abs() > x.abs().max() / 100].max() < (0.12 if square else 0.2)
    blocks = forms.encode_moment(x, U8, square, 0)[1]
    assert torch.equal(blocks, torch.stack([piece.abs().max() for piece in x.split(256)]))


def test_8_bit_codes_at_their_ends():
    x = torch.zeros(600)
    for square in (False, True):
        codes, scales = forms.encode_moment(x, U8, square, 0xFFFF)
        assert codes.unique().tolist() == [0 if square else 128] and not scales.any() and len(scales) == 3
        assert torch.equal(forms.decode_moment(codes, scales, square), x)
    x[0], x[1], x[2], x[300], x[301] = 3.0, -3.0, 1e-30, float("inf"), 1.0
    codes, scales = forms.encode_moment(x, U8, False, 0)
    assert codes[:4].tolist() == [255, 1, 129, 128] and scales.tolist() == [3.0, float("inf"), 0.0]
    x[1] = 0
    for bits in (0, 0xFFFF):
        codes, scales = forms.encode_moment(x, U8, True, bits)
        assert codes[:4].tolist() == [255, 0, 1, 0], "what is above zero stays above it"
        values = forms.decode_moment(codes, scales, True)
        assert (
            values[0] == 3 and values[2] == pytest.approx(3 * 2 ** (-254 / 6.375)) and not values[302:].any()
        )
    for square in (False, True):  # every code is its own nearest
        codes = torch.arange(0 if square else 1, 256, dtype=U8)
        values = forms.decode_moment(codes, torch.tensor([0.7]), square)
        assert torch.equal(forms.encode_moment(values, U8, square, forms.NEAREST)[0], codes)


# ---------------------------------------------------------------- the op


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_kernels_equal_the_reference(form, backend):
    """Bit for bit but for the approximations of a GPU: a code or a rounding differs here and there."""
    ours, theirs = (Run((*SHAPES, (256,), (513, 256)), device="cuda", **form) for _ in range(2))
    scale = torch.tensor([0.5], device="cuda")
    firsts = [2**32 - 1000 + 997 * i for i in range(len(ours.params))]
    for run, name in ((ours, backend), (theirs, "reference")):
        run.go(1, backend=name, grad_scale=scale, seed=3, firsts=firsts)
    for kind in range(2):
        for o, t in zip(moments_of(ours)[kind], moments_of(theirs)[kind]):
            if o.numel():
                assert (o != t).double().mean() <= 0.01 or o.numel() < 1000
                assert (o - t).abs().max() <= {F32: 1e-6, BF16: 0.01, U8: 0.13}[
                    form["moment"]
                ] * t.abs().max()
    for o, t in zip(weights_of(ours), weights_of(theirs)):
        near(o, t, 2**16 if form["master"] is None else 4)
    for run, name in ((ours, backend), (theirs, "reference")):
        run.go(4, backend=name, grad_scale=scale, seed=3, firsts=firsts)
    for o, t in zip(weights_of(ours), weights_of(theirs)):
        if o.numel() > 1000:
            assert (o - t).abs().mean() <= 1e-3 * t.abs().mean()


@pytest.mark.parametrize("moment", MOMENTS)
def test_remainders_equal_fp32_masters(device, moment):
    """To the bit, whatever the moments are."""
    exact, lean = (Run(SHAPES, BF16, device, moment=moment, master=master).go(6) for master in (F32, I16))
    if device == "cpu" and moment == F32:  # a kernel of its own, with its own roundings
        exact = Run(SHAPES, BF16, device, moment=moment).go(6, backend="reference")
    for o, t, p in zip(weights_of(lean), exact.masters, lean.params):
        assert torch.equal(o, t) and torch.equal(p, forms.split_master(t)[0])
    for o, t in zip(chain(*moments_of(lean)), chain(*moments_of(exact))):
        assert torch.equal(o, t)


@pytest.mark.parametrize("moment", (BF16, U8))
def test_moments_are_unbiased(device, moment):
    """Of 65,536 elements with the same gradients, whose moments are between codes, the mean is the fp32 moment."""
    size, grads = 2**16, (1.0, 0.3, -0.7, 0.05, 0.05, 0.05)
    run = Run([(size,)], F32, device, moment=moment)
    m = v = 0.0
    for step, g in enumerate(grads, 1):
        grad = torch.full((size,), g, device=device)
        grad[::256] = 2.0  # the scale of each block
        adamw(run.params, [grad], *run.lists[1:], run.scales, step=step, **HYPER)
        m, v = m + (g - m) * 0.1, v + (g * g - v) * 0.001
    ours = torch.arange(size, device=device) % 256 != 0
    for values, exact in zip(moments_of(run), (m, v)):
        values = values[0][ours].double()
        assert len(values.unique()) > 1 and values.std() < 0.15 * abs(exact)
        assert abs(values.mean() - exact) < 5 * values.std() / len(values) ** 0.5 + 1e-6 * abs(exact)


def test_weights_without_masters_move_as_far_as_they_should(device):
    """By steps of a hundredth of an ulp: none would move if they were rounded to the nearest."""
    run = Run([(2**14,)], BF16, device, master=None)
    run.params[0].fill_(1.0)
    for step in range(1, 101):
        adamw(run.params, [torch.ones(2**14, dtype=BF16, device=device)], *run.lists[1:], step=step,
              **{**HYPER, "lr": 4e-5, "weight_decay": 0.0})  # fmt: skip
    moved = 1 - run.params[0].double()
    assert moved.mean().item() == pytest.approx(100 * 4e-5, abs=5 * moved.std().item() / 2**7)
    assert (moved == 0).any() and (moved > 0).any()


def test_bits_do_not_depend_on_how_tensors_are_split(device, form):
    whole = Run([(2048,)], device=device, **form)
    cuts, firsts = (0, 256, 1280, 2048), [5_000_000_000, 5_000_000_256, 5_000_001_280]
    pieces = Run([(256,), (1024,), (768,)], device=device, **form)
    for ours, theirs in zip((pieces.params, pieces.masters), (whole.params, whole.masters)):
        for i, t in enumerate(ours):
            t.copy_(theirs[0][cuts[i] : cuts[i + 1]])
    for step in (1, 2, 3):
        (grad,) = whole.grads()
        adamw(
            whole.params,
            [grad],
            *whole.lists[1:],
            whole.scales,
            step=step,
            seed=9,
            firsts=firsts[:1],
            **HYPER,
        )
        order = [2, 0, 1]  # nor on the order of a call
        lists = [grad.split([256, 1024, 768]), *pieces.lists, pieces.scales]
        grads, params, ms, vs, masters, scales = ([t[i] for i in order] if t else [] for t in lists)
        own = [firsts[i] for i in order]
        adamw(params, grads, ms, vs, masters, scales, step=step, seed=9, firsts=own, **HYPER)
    for w, p in zip(chain(*whole.lists), (torch.cat(t) for t in pieces.lists if t)):
        assert torch.equal(w, p)
    for w, p in zip(whole.scales, [torch.cat(pieces.scales, 1)] if whole.scales else []):
        assert torch.equal(w, p)


def test_bits_follow_seed_and_step(device):
    """The same twice; others with another seed, and in another step."""
    results = [
        Run([(4096,)], BF16, device, moment=U8, master=None).go(1, seed=seed, firsts=firsts)
        for seed, firsts in ((1, None), (1, [0]), (2, None), (1, [4096]))
    ]
    assert same(results[0], results[1])
    for other in results[2:]:
        assert (other.params[0] != results[0].params[0]).double().mean() > 0.05
        assert (other.exp_avgs[0] != results[0].exp_avgs[0]).double().mean() > 0.1


def test_nan_and_infinite_gradients(device, form):
    """The element is lost, its neighbours' step is as it was; the loss will tell."""
    run, plain = Run([(1000,)], device=device, **form), Run([(1000,)], device=device, **form)
    (grad,) = plain.grads()
    bad = grad.clone()
    bad[300], bad[700] = float("nan"), float("inf")
    adamw(plain.params, [grad], *plain.lists[1:], plain.scales, step=1, **HYPER)
    adamw(run.params, [bad], *run.lists[1:], run.scales, step=1, **HYPER)
    others = torch.ones(1000, dtype=torch.bool, device=device)
    others[[300, 700]] = False
    assert run.params[0][[300, 700]].isnan().all()
    assert torch.equal(run.params[0][others], plain.params[0][others])
    adamw(run.params, [grad], *run.lists[1:], run.scales, step=2, **HYPER)
    assert run.params[0][[300, 700]].isnan().all() and run.params[0][:300].isfinite().all()


def test_numbers_on_the_device_key_the_same_bits(device):
    ours, theirs = (Run(SHAPES, BF16, device, moment=U8, master=None) for _ in range(2))
    for step in (1, 2):
        grads = ours.grads()
        numbers = {
            "lr": torch.tensor([1e-2], device=device),
            "step": torch.tensor([float(step)], device=device),
        }
        adamw(ours.params, grads, *ours.lists[1:], ours.scales, **{**HYPER, **numbers})
        adamw(theirs.params, grads, *theirs.lists[1:], theirs.scales, step=step, **HYPER)
    for o, t in zip(chain(*ours.lists), chain(*theirs.lists)):
        assert o.numel() < 1000 or (o != t).double().mean() < 0.01


def test_more_elements_than_a_chunk(device, monkeypatch):
    from openllama.kernels import adamw as module

    whole = Run([(1000, 3)], BF16, device, moment=U8, master=I16).go(2, backend="reference")
    monkeypatch.setattr(module, "_CHUNK", 512)
    assert same(whole, Run([(1000, 3)], BF16, device, moment=U8, master=I16).go(2, backend="reference"))


@pytest.mark.gpu
def test_opcheck(form):
    run = Run([(7,), (300, 5)], device="cuda", **form)
    for namespace in (torch.ops.openllama, torch.ops.openllama_triton):
        torch.library.opcheck(
            namespace.adamw_.default,
            (run.params, run.grads(), *run.lists[1:], run.scales, [0, 0], [1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0],
             None, None, None, 0, [0, 7]),
        )  # fmt: skip


# ---------------------------------------------------------------- errors

WRONG = {
    "no scales": (U8, I16, "scales", lambda t: [], r"scales: got 0 tensors, takes one for each of 2 params"),
    "scales' shape": (U8, I16, "scales", lambda t: [t[0], t[1][:, :1]], r"scales\[1\]: got shape \(2, 1\), takes \(2, 2\)"),
    "remainders' dtype": (F32, I16, "masters", lambda t: [t[0], t[1].float()], r"masters\[1\]: got torch.float32, takes"),
    "one kind of moments": (U8, F32, "exp_avg_sqs", lambda t: [x.float() for x in t], r"exp_avg_sqs\[0\]: got torch.float32"),
    "strides": (BF16, I16, "exp_avgs", lambda t: [t[0], t[1].T.contiguous().T], r"exp_avgs\[1\]: got strides"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_state_is_named_and_nothing_written(device, name):
    moment, master, key, change, message = WRONG[name]
    run = Run([(3,), (40, 10)], BF16, device, moment=moment, master=master)
    setattr(run, key, change(getattr(run, key)))
    before = [t.clone() for t in chain(*run.lists, run.scales)]
    with pytest.raises((TypeError, ValueError), match=message):
        run.go(1)
    assert all(torch.equal(a, b) for a, b in zip(before, chain(*run.lists, run.scales)))


@pytest.mark.parametrize("dtype, master", ((F16, I16), (F32, F32), (F32, I16)))
def test_masters_that_a_dtype_does_not_have(device, dtype, master):
    run = Run([(3,)], dtype, device)
    run.masters = [torch.zeros(3, dtype=master, device=device)]
    with pytest.raises((TypeError, ValueError), match="masters"):
        run.go(1)


def test_the_cpu_kernel_says_what_it_lacks(form, monkeypatch):
    if form["dtype"] == F16:
        return
    run = Run([(3,)], device="cpu", **form)
    for forced in (False, True):
        monkeypatch.setattr(backends, "FORCED", "cpu" if forced else None)
        with pytest.raises(ValueError, match=r"adamw can't run on 'cpu' here: it has no kernel for [mb]"):
            run.go(1, backend=None if forced else "cpu")
