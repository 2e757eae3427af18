"""openllama.optim.AdamW: state, groups, schedulers, resume."""

import copy
import io

import pytest
import torch
from torch import nn

from openllama.optim import AdamW, decay_groups

from .contract import BF16, F32, F64
from .rule import near, random


def model(dtype=F32, device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(device, dtype)


def train(net, optimizer, scheduler, steps, first=0):
    for step in range(first, first + steps):
        x = random((8, 6), next(net.parameters()).dtype, next(net.parameters()).device.type, step)
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()
        scheduler.step()
    return [p.detach().clone() for p in net.parameters()]


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)


def saved(thing):
    """Through torch.save and a weights-only load, as a checkpoint goes."""
    buffer = io.BytesIO()
    torch.save(thing.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", (F32, F64))
def test_equals_torch(device, dtype):
    nets = model(dtype, device), model(dtype, device)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = (cls(net.parameters(), **options) for cls, net in zip((AdamW, torch.optim.AdamW), nets))
    for o, t in zip(train(nets[0], ours, schedule(ours), 8), train(nets[1], theirs, schedule(theirs), 8)):
        near(o, t, 16)


@pytest.mark.parametrize("dtype", (F32, BF16, F64))
def test_resume_is_bit_for_bit(device, dtype):
    """10 steps equal 4, a save, and 6 in new objects: weights, moments, masters, step and learning rate."""
    whole = model(dtype, device)
    optimizer = AdamW(decay_groups(whole, 0.1), lr=1e-2)
    train(whole, optimizer, schedule(optimizer), 10)

    first = model(dtype, device)
    halfway = AdamW(decay_groups(first, 0.1), lr=1e-2)
    scheduler = schedule(halfway)
    train(first, halfway, scheduler, 4)
    files = [saved(t) for t in (first, halfway, scheduler)]

    second = model(dtype, device)
    resumed = AdamW(decay_groups(second, 0.1), lr=1e-2)
    next_scheduler = schedule(resumed)
    for thing, file in zip((second, resumed, next_scheduler), files):
        thing.load_state_dict(file)
    train(second, resumed, next_scheduler, 6, first=4)
    for a, b in zip(whole.parameters(), second.parameters()):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == resumed.state[b].keys()
        assert all(torch.equal(v, resumed.state[b][k]) for k, v in optimizer.state[a].items())


def test_state_dict_keeps_every_bit(device):
    net = model(BF16, device)
    optimizer = AdamW(net.parameters(), lr=1e-2)
    train(net, optimizer, schedule(optimizer), 3)
    other = AdamW(model(BF16, device).parameters(), lr=1.0)
    other.load_state_dict(saved(optimizer))
    before = copy.deepcopy(optimizer.state_dict())
    for (_, mine), theirs in zip(sorted(before["state"].items()), other.state.values()):
        assert mine.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq", "master"}
        for key, value in mine.items():
            assert value.dtype == theirs[key].dtype == F32 and torch.equal(value, theirs[key]), key
    assert {int(s["step"]) for s in other.state.values()} == {3} and other.param_groups[0]["lr"] != 1.0
    next(iter(other.state.values()))["exp_avg"].add_(1)  # a copy: the saved state stays
    assert torch.equal(before["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_frozen_unused_empty_and_late_parameters(device):
    """Each parameter has its own step: one that gets gradients later starts at 1."""
    early, late, frozen, unused, empty = (nn.Parameter(random((n,), F32, device, n)) for n in (3, 4, 5, 6, 0))
    frozen.requires_grad_(False)
    before = [p.detach().clone() for p in (frozen, unused)]
    ours = AdamW([early, late, frozen, unused, empty], lr=1e-2, weight_decay=0.1)
    twins = [nn.Parameter(p.detach().clone()) for p in (early, late)]
    theirs = torch.optim.AdamW(twins, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(6):
        for a, b in zip((early, late), twins):
            a.grad = b.grad = None if a is late and step < 3 else random(a.shape, F32, device, step)
        empty.grad = torch.zeros_like(empty)
        ours.step(), theirs.step()
    near(early.detach(), twins[0].detach(), 4), near(late.detach(), twins[1].detach(), 4)
    assert torch.equal(frozen, before[0]) and torch.equal(unused, before[1])
    assert [int(ours.state[p]["step"]) for p in (early, late, empty)] == [6, 3, 6]
    assert frozen not in ours.state and unused not in ours.state


def test_mixed_dtypes_in_one_group(device):
    params = [
        nn.Parameter(random((n,), dtype, device, n)) for n, dtype in ((3, F32), (4, BF16), (5, F64), (6, F32))
    ]
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, lr=0.1, eps=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, b in zip(params, before):
        near(p.detach(), (b.double() * (1 - 0.1 * 0.1) - 0.1).to(p.dtype), 4)


def test_only_matrices_decay():
    net = model()
    matrices, vectors = decay_groups(net, 0.3)
    assert all(p.dim() == 2 for p in matrices["params"]) and len(matrices["params"]) == 2
    assert all(p.dim() == 1 for p in vectors["params"]) and len(vectors["params"]) == 4
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    optimizer = AdamW([matrices, vectors], lr=0.5)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, b in zip(net.parameters(), before):
        near(p.detach(), b * (0.85 if p.dim() == 2 else 1.0), 2)


def test_a_failed_step_changes_nothing():
    net = model()
    optimizer = AdamW([{"params": [p]} for p in net.parameters()], lr=1e-2)
    train(net, optimizer, schedule(optimizer), 2)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.param_groups[-1]["lr"] = float("nan")
    before = copy.deepcopy((optimizer.state_dict()["state"], [p.detach() for p in net.parameters()]))
    with pytest.raises(ValueError, match="lr: got nan"):
        optimizer.step()
    state = optimizer.state_dict()["state"]
    assert all(torch.equal(v, state[i][k]) for i, s in before[0].items() for k, v in s.items())
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before[1]))


def test_torchs_state_gets_masters():
    net = model(BF16)
    theirs = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, theirs, schedule(theirs), 2)
    ours = AdamW(net.parameters(), lr=1e-2)
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(ours.state[p]["master"], p.detach().float()) for p in net.parameters())
    train(net, ours, schedule(ours), 1)


@pytest.mark.parametrize("bad", ("sparse", "complex"))
def test_a_bad_parameter_in_a_later_group_changes_nothing(bad):
    good = nn.Parameter(torch.ones(3))
    good.grad = torch.ones(3)
    other = nn.Parameter(torch.ones(3, dtype=torch.complex64 if bad == "complex" else F32))
    other.grad = torch.ones_like(other).to_sparse() if bad == "sparse" else torch.ones_like(other)
    optimizer = AdamW([{"params": [good]}, {"params": [other]}])
    with pytest.raises(TypeError, match=bad):
        optimizer.step()
    assert torch.equal(good, torch.ones(3))


def test_closure():
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)

    def closure():
        loss = net(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None and len(optimizer.state) == 6


@pytest.mark.parametrize("name", ("lr", "eps", "weight_decay"))
@pytest.mark.parametrize("value", (-1.0, float("nan"), float("inf")))
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}"):
        AdamW(model().parameters(), **{name: value})


def test_bad_betas_and_sparse_gradients_are_named():
    with pytest.raises(ValueError, match=r"betas: got \(0.9, 1.0\)"):
        AdamW(model().parameters(), betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"betas: got \(0.9,\), takes two numbers"):
        AdamW(model().parameters(), betas=(0.9,))
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="grad: got a sparse gradient"):
        AdamW(embedding.parameters()).step()


@pytest.mark.parametrize("capturable", (False, True))
def test_cleared_state_starts_anew(capturable):
    p = nn.Parameter(torch.ones(4))
    optimizer = AdamW([p], lr=1.0, weight_decay=0.0, capturable=capturable)
    for _ in range(5):
        p.grad = torch.ones(4)
        optimizer.step()
    optimizer.state.clear()
    before = p.detach().clone()
    optimizer.step()
    assert int(optimizer.state[p]["step"]) == 1
    near(p.detach(), before - 1, 4)  # the first step of AdamW has the size lr


def test_a_parameter_that_cannot_be_stepped_stops_all():
    """Of another dtype, so that it would come in a call of its own, after the first's."""
    good, bad = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 3, dtype=BF16).T)
    for p in (good, bad):
        p.grad = torch.ones_like(p)
    optimizer = AdamW([good, bad])
    with pytest.raises(ValueError, match=r"params: got a parameter with strides \(1, 3\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="grad_scale: got a tensor on meta"):
        AdamW([good]).step(grad_scale=torch.ones(1, device="meta"))
    assert torch.equal(good, torch.ones(4))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: torch.optim.SGD(p, momentum=0.9), "param_groups: got no 'betas'"),
        (lambda p: torch.optim.SGD(p), "param_groups: got no 'betas'"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "param_groups: got maximize=True"),
    ],
)
def test_state_of_another_optimizer_is_named(make, message):
    net = model()
    theirs, ours = make(net.parameters()), AdamW(net.parameters(), lr=0.5)
    train(net, theirs, schedule(theirs), 1)
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state and ours.param_groups[0]["lr"] == 0.5
