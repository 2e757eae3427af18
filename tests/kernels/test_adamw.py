"""adamw, the op: against torch.optim.AdamW in float64, masters, numbers of groups, bad input.

test_adamw_forms.py has state in 8 and 16 bits, test_optim.py the optimizer.
"""

import random as python_random
from itertools import chain

import pytest
import torch

from openllama.ops import adamw

from .contract import BF16, F16, F32, F64
from .rule import near, random

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((), (1,), (7,), (0,), (3, 0), (123, 41), (16_384,), (16_385,), (2, 3, 5, 7), (300, 200))


class Run:
    """Lists of tensors for the op, and its steps. `moment` is the moments' dtype, `master` the masters', None without."""

    def __init__(self, shapes, dtype, device, grad_dtype=None, seed=0, moment=F32, master=F32):
        self.params = [random(s, dtype, device, seed + i) for i, s in enumerate(shapes)]
        moment = F64 if dtype == F64 else moment
        self.masters = []
        if dtype in (BF16, F16) and master is not None:
            self.masters = [
                p.to(F32) if master == F32 else torch.zeros_like(p, dtype=master) for p in self.params
            ]
        self.exp_avgs = [torch.zeros_like(p, dtype=moment) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p, dtype=moment) for p in self.params]
        self.scales = []
        if moment == torch.uint8:
            self.scales = [torch.zeros(2, -(-p.numel() // 256), device=device) for p in self.params]
            for m in self.exp_avgs:
                m.fill_(128)
        self.grad_dtype, self.step = grad_dtype or dtype, 0

    @property
    def lists(self):
        return [self.params, self.exp_avgs, self.exp_avg_sqs, self.masters]

    def grads(self):
        """Of very different sizes, and step by step the same whatever the dtype is (rounded to grad_dtype)."""
        return [
            random(p.shape, self.grad_dtype, p.device.type, 1000 * self.step + i, 10.0 ** (i % 7 - 4))
            for i, p in enumerate(self.params)
        ]

    def go(self, steps, **options):
        for _ in range(steps):
            self.step += 1
            adamw(
                self.params,
                self.grads(),
                *self.lists[1:],
                self.scales,
                step=self.step,
                **{**HYPER, **options},
            )
        return self


def torch_steps(run, steps, dtype, **options):
    """torch.optim.AdamW on the same start and gradients, in `dtype`: its params and both moments."""
    h = {**HYPER, **options}
    params = [torch.nn.Parameter(p.to(dtype)) for p in run.params]
    optimizer = torch.optim.AdamW(
        params, h["lr"], (h["beta1"], h["beta2"]), h["eps"], h["weight_decay"], foreach=False
    )
    for _ in range(steps):
        run.step += 1
        for p, g in zip(params, run.grads()):
            p.grad = g.to(dtype)
        optimizer.step()
    states = [optimizer.state[p] for p in params]
    return [[p.detach() for p in params], *([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq"))]


def assert_rule(ours, theirs, exact):
    """Each tensor is as near to float64 as torch's fp32 run, and 2 ulps of its largest value."""
    for name, *lists in zip(("params", "exp_avgs", "exp_avg_sqs"), ours, theirs, exact):
        for i, (o, t, e) in enumerate(zip(*lists)):
            if o.numel():
                slack = 2 * torch.finfo(F32).eps * e.abs().max().item()
                assert (o.double() - e).abs().max() <= (t.double() - e).abs().max() + slack, f"{name}[{i}]"


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("options", ({}, {"weight_decay": 0.0}, {"beta1": 0.0}, {"beta2": 0.95, "eps": 1e-5}))
def test_fp32_against_torch(device, backend, options):
    ours = Run(SHAPES, F32, device).go(12, backend=backend, **options)
    theirs = torch_steps(Run(SHAPES, F32, device), 12, F32, **options)
    exact = torch_steps(Run(SHAPES, F32, device), 12, F64, **options)
    assert_rule(ours.lists, theirs, exact)


def test_fp64_against_torch(device):
    ours, exact = Run(SHAPES, F64, device).go(5), torch_steps(Run(SHAPES, F64, device), 5, F64)
    for o, e in zip(ours.params, exact[0]):
        near(o, e, 16)


@pytest.mark.parametrize("dtype", (BF16, F16))
def test_masters_follow_the_fp32_run(device, dtype):
    """Masters equal an fp32 run from the same start and gradients to the bit; weights are the masters, rounded."""
    ours = Run(SHAPES, dtype, device)
    wide = Run(SHAPES, F32, device, grad_dtype=dtype)
    for w, p in zip(wide.params, ours.params):
        w.copy_(p)
    if dtype == F16:  # no kernel: both on the reference
        ours.go(8, backend="reference"), wide.go(8, backend="reference")
    else:
        ours.go(8), wide.go(8)
    for master, weight, p in zip(ours.masters, wide.params, ours.params):
        assert torch.equal(master, weight) and torch.equal(p, master.to(dtype))


def test_steps_below_an_ulp_add_up(device):
    """lr is a hundredth of a bf16 ulp of 1: without a master the weight would never move."""
    run = Run([(8,)], BF16, device)
    run.params[0].fill_(1.0), run.masters[0].fill_(1.0)
    for step in range(1, 301):
        adamw(run.params, [torch.ones(8, dtype=BF16, device=device)], *run.lists[1:],
              step=step, **{**HYPER, "lr": 4e-5, "weight_decay": 0.0})  # fmt: skip
    assert (run.masters[0] - (1 - 300 * 4e-5)).abs().max() < 1e-4 and (run.params[0] < 1).all()


@pytest.mark.parametrize("dtype, grad_dtype", ((F32, BF16), (F32, F16), (BF16, F32), (BF16, F16), (F16, F32)))
def test_gradients_in_another_dtype(device, dtype, grad_dtype):
    ours = Run(SHAPES, dtype, device, grad_dtype).go(3)
    theirs = Run(SHAPES, dtype, device, grad_dtype).go(3, backend="reference")
    for o, t in zip(ours.masters or ours.params, theirs.masters or theirs.params):
        near(o, t, 4)


def test_strided_gradients(device):
    run, same = Run([(6, 8)], F32, device), Run([(6, 8)], F32, device)
    grad = random((8, 6), F32, device, 1)
    adamw(run.params, [grad.T], *run.lists[1:], step=1, **HYPER)
    adamw(same.params, [grad.T.contiguous()], *same.lists[1:], step=1, **HYPER)
    assert torch.equal(run.params[0], same.params[0])


def test_nan_gradient_stays_in_its_element(device):
    run = Run([(20_000,)], F32, device)
    grad = random((20_000,), F32, device, 1)
    grad[17_000] = float("nan")
    adamw(run.params, [grad], *run.lists[1:], step=1, **HYPER)
    assert run.params[0].isnan().nonzero().tolist() == [[17_000]]


def test_no_tensors():
    adamw([], [], [], [], [], step=1, **HYPER)


def test_fuzz_against_the_reference(device):
    for seed in range(60):
        rng = python_random.Random(seed)
        shapes = [tuple(rng.choice((0, 1, 2, 7, 33, 130)) for _ in range(rng.randrange(4))) for _ in range(5)]
        dtype, grad_dtype = rng.choice((F32, BF16)), rng.choice((F32, BF16))
        options = {"lr": rng.choice((0.0, 1e-3, 1.0)), "weight_decay": rng.choice((0.0, 0.1)),
                   "beta1": rng.choice((0.0, 0.9))}  # fmt: skip
        ours, theirs = (
            Run(shapes, dtype, device, grad_dtype, seed).go(3, backend=backend, **options)
            for backend in (None, "reference")
        )
        for o, t in zip(chain(*ours.lists[1:]), chain(*theirs.lists[1:])):
            near(o, t, 32, f"seed {seed}: {shapes} {dtype} {grad_dtype} {options}")


def test_two_runs_and_thread_counts_are_equal(device):
    first = Run(SHAPES, BF16, device).go(3)
    torch.set_num_threads(2)
    second = Run(SHAPES, BF16, device).go(3)
    assert all(torch.equal(a, b) for x, y in zip(first.lists, second.lists) for a, b in zip(x, y))


def test_opcheck():
    for dtype in (F32, BF16):
        run = Run([(7,), (3, 5)], dtype, "cpu")
        torch.library.opcheck(
            torch.ops.openllama.adamw_.default,
            (
                run.params,
                run.grads(),
                *run.lists[1:],
                [],
                [0, 0],
                [1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0],
                None,
                None,
                None,
                0,
                [0, 7],
            ),
        )


def test_a_weight_saved_for_backward_is_seen_to_change(device):
    run = Run([(4, 4)], F32, device)
    weight = run.params[0].requires_grad_()
    y = torch.ones(2, 4, device=device, requires_grad=True) @ weight
    with torch.no_grad():
        run.go(1)
    with pytest.raises(RuntimeError, match=r"modified.*inplace"):
        y.sum().backward()


def test_compiled_equals_eager(device):
    torch._dynamo.reset()
    ours, theirs = Run([(7,), (3, 5)], F32, device), Run([(7,), (3, 5)], F32, device).go(3)
    compiled = torch.compile(adamw, fullgraph=True, backend="aot_eager")
    for step in (1, 2, 3):
        ours.step = step
        compiled(ours.params, ours.grads(), *ours.lists[1:], step=step, **HYPER)
    for o, t in zip(chain(*ours.lists), chain(*theirs.lists)):
        near(o, t, 2)


def same(ours, theirs):
    """Whether two runs hold the same bits."""
    pairs = zip((*ours.lists, ours.scales), (*theirs.lists, theirs.scales))
    return all(torch.equal(o, t) for a, b in pairs for o, t in zip(a, b, strict=True))


NUMBERS = {"lr": (1e-2, 1e-3, 1e-2), "beta1": (0.9, 0.8, 0.9), "beta2": (0.99, 0.9, 0.99), "eps": (1e-8, 1e-6, 1e-8),
           "weight_decay": (0.1, 0.0, 0.1), "step": (3, 7, 3)}  # fmt: skip


@pytest.mark.parametrize("backend", (None, "reference"))
def test_numbers_of_each_tensor_equal_calls_of_their_own(device, backend):
    shapes = [(5,), (300, 7), ()]
    together, alone = Run(shapes, F32, device), Run(shapes, F32, device)
    adamw(together.params, together.grads(), *together.lists[1:], backend=backend, **NUMBERS)
    grads = alone.grads()
    for i in range(3):
        own = {name: values[i] for name, values in NUMBERS.items()}
        adamw(
            [alone.params[i]], [grads[i]], [alone.exp_avgs[i]], [alone.exp_avg_sqs[i]], backend=backend, **own
        )
    assert same(together, alone)
    named = Run(shapes, F32, device)
    pairs = {name: values[:2] for name, values in NUMBERS.items()}
    adamw(named.params, named.grads(), *named.lists[1:], groups=[0, 1, 0], backend=backend, **pairs)
    assert same(together, named)


@pytest.mark.parametrize("backend", (None, "reference"))
def test_numbers_on_the_device(device, backend):
    """lr, step and grad_scale as tensors equal plain numbers (and scaled gradients)."""
    shapes = [(5,), (300, 7), ()]
    ours, theirs = Run(shapes, F32, device), Run(shapes, F32, device)
    lr, step = (torch.tensor(NUMBERS[name][:2], device=device) for name in ("lr", "step"))
    scale = torch.tensor(0.25, device=device)  # and, with one group, tensors without a dimension
    one = {"lr": torch.tensor(0.5, device=device), "step": torch.tensor(2.0, device=device)}
    adamw(ours.params, ours.grads(), *ours.lists[1:], **{**HYPER, **one, "backend": backend})
    adamw(
        theirs.params,
        theirs.grads(),
        *theirs.lists[1:],
        **{**HYPER, "lr": 0.5, "step": 2, "backend": backend},
    )
    pairs = {
        **{name: values[:2] for name, values in NUMBERS.items()},
        "groups": [0, 1, 0],
        "backend": backend,
    }
    adamw(
        ours.params,
        ours.grads(),
        *ours.lists[1:],
        grad_scale=scale,
        **{**pairs, "lr": lr, "step": step.float()},
    )
    adamw(theirs.params, [g / 4 for g in theirs.grads()], *theirs.lists[1:], **pairs)
    for o, t in zip(chain(*ours.lists), chain(*theirs.lists)):
        near(o, t, 4)
    assert torch.equal(ours.exp_avgs[1], theirs.exp_avgs[1])


def _broken(name):
    """Arguments with one thing wrong in the last tensor or in a number."""
    run = Run([(3,), (4, 5)], BF16 if name.startswith("master") else F32, "cpu")
    lists = dict(zip(("params", "exp_avgs", "exp_avg_sqs", "masters"), run.lists), grads=run.grads())
    options = {"step": 1, **HYPER}
    if name == "grads length":
        lists["grads"] = lists["grads"][:1]
    elif name == "masters length":
        lists["masters"] = lists["masters"][:1]
    elif name.endswith("shape"):
        key = name.split()[0]
        lists[key] = [lists[key][0], lists[key][1].T.contiguous()]
    elif name == "exp_avgs dtype":
        lists["exp_avgs"][1] = lists["exp_avgs"][1].bfloat16()
    elif name == "params dtype":
        lists["params"][1] = lists["params"][1].bfloat16()
    elif name == "grads dtype":
        lists["grads"][1] = lists["grads"][1].int()
    elif name == "params strides":
        lists["params"][1], lists["grads"][1] = torch.zeros(5, 4).T, torch.zeros(4, 5)
    elif name == "no gradient":
        lists["grads"][1] = None
    elif name == "device":
        lists["grads"][1] = lists["grads"][1].to("meta")
    elif name in OPTIONS:
        options |= OPTIONS[name]
    else:
        key, value = name.split("=")
        options[key] = float(value)
    return lists, options


OPTIONS = {
    "groups": {"groups": [0, 1]},
    "groups length": {"groups": [0]},
    "firsts length": {"firsts": [0]},
    "numbers": {"lr": [0.1, 0.1, 0.1]},
    "numbers of two lengths": {"lr": [0.1, 0.1], "eps": [0.1]},
    "a bad number of a group": {"lr": [0.1, -0.1]},
    "seed": {"seed": -1},
    "grad_scale": {"grad_scale": torch.ones(2)},
    "grad_scale dtype": {"grad_scale": torch.ones(1, dtype=F64)},
    "lr's dtype": {"lr": torch.ones(1, dtype=F64)},
    "scales": {"scales": [torch.zeros(2, 1)] * 2},
    "no number": {"lr": None},
    "a tensor of numbers that can't be": {"beta1": torch.ones(2)},
}


BROKEN = {
    "grads length": r"grads: got 1 tensors, takes one for each of 2 params",
    "masters length": r"masters: got 1 tensors, takes one for each of 2 params",
    "grads shape": r"grads\[1\]: got shape \(5, 4\), takes \(4, 5\)",
    "exp_avg_sqs shape": r"exp_avg_sqs\[1\]: got shape \(5, 4\)",
    "masters shape": r"masters\[1\]: got shape \(5, 4\)",
    "exp_avgs dtype": r"exp_avgs\[1\]: got torch.bfloat16, takes the optimizer state's torch.float32",
    "params dtype": r"params\[1\]: got torch.bfloat16",
    "grads dtype": r"grads\[1\]: got torch.int32",
    "params strides": r"params\[1\]: got strides \(1, 4\), takes a contiguous tensor",
    "no gradient": r"grads\[1\]: got NoneType, takes a tensor",
    "device": r"grads\[1\]: got a tensor on meta, takes params\[0\]'s cpu",
    "groups": r"groups: got 0 to 1, takes 0 to 0",
    "groups length": r"groups: got 1 numbers, takes one for each of 2 params",
    "firsts length": r"firsts: got 1 numbers, takes one for each of 2 params",
    "numbers": r"lr: got 3 numbers, takes one for each of 2 params, or `groups`",
    "numbers of two lengths": r"eps: got 1 numbers, takes 2",
    "a bad number of a group": r"lr: got -0.1",
    "seed": r"seed: got -1, takes a whole number",
    "grad_scale": r"grad_scale: got 2 numbers, takes one",
    "grad_scale dtype": r"grad_scale: got torch.float64",
    "lr's dtype": r"lr: got torch.float64",
    "scales": r"scales: got 2 tensors, takes none for exp_avgs of torch.float32",
    "no number": r"lr: got None, takes a finite number",
    "a tensor of numbers that can't be": r"beta1: got a tensor, takes numbers",
    "lr=nan": "lr: got nan",
    "lr=-1": "lr: got -1.0",
    "eps=inf": "eps: got inf",
    "weight_decay=-0.1": "weight_decay: got -0.1",
    "beta1=1": "beta1: got 1.0",
    "beta2=-0.5": "beta2: got -0.5",
    "step=0": "step: got 0.0",
    "step=1.5": "step: got 1.5",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("backend", (None, "reference"))
def test_bad_input_is_named_and_nothing_written(name, backend):
    lists, options = _broken(name)
    before = {key: [t if t is None else t.clone() for t in tensors] for key, tensors in lists.items()}
    with pytest.raises((TypeError, ValueError), match=BROKEN[name]):
        adamw(lists["params"], lists["grads"], lists["exp_avgs"], lists["exp_avg_sqs"], lists["masters"],
              backend=backend, **options)  # fmt: skip
    for key, tensors in lists.items():
        for t, b in zip(tensors, before[key]):
            assert t is None or t.device.type == "meta" or torch.equal(t, b), key
