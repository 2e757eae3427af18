"""openllama.optim.AdamW with leaner state: resume, conversion between forms, steps that a CUDA graph can hold."""

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import nn

from openllama.kernels.adamw_forms import decode_moment, join_master, split_master
from openllama.optim import AdamW, decay_groups

from .contract import BF16, F16, F32, F64
from .rule import near, random
from .test_optim import model, saved, schedule, train

FORMS = list(product(("fp32", "bf16", "8bit"), ("fp32", "remainder", "none")))
LEAN = {"moments": "8bit", "masters": "remainder"}


def start(dtype, device, moments="fp32", masters="fp32", **options):
    """A small net, its optimizer and a schedule."""
    net = model(dtype, device)
    optimizer = AdamW(decay_groups(net, 0.1), lr=1e-2, moments=moments, masters=masters, **options)
    return net, optimizer, schedule(optimizer)


def trained(dtype, device, *form, steps=3, **options):
    """A net after some steps, and its optimizer."""
    net, optimizer, scheduler = start(dtype, device, *form, **options)
    train(net, optimizer, scheduler, steps)
    return net, optimizer


def twin(net):
    """A net with the same bits."""
    other = copy.deepcopy(net)
    other.zero_grad()
    return other


def state_of(optimizer):
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def equal_states(a, b):
    return all(
        s.keys() == t.keys() and all(torch.equal(s[k], t[k]) and s[k].dtype == t[k].dtype for k in s)
        for s, t in zip(state_of(a), state_of(b), strict=True)
    )


def fp32_state(p, state):
    """Moments and exact weight in fp32."""
    scales = state.get("scales", (None, None))
    moments = [
        decode_moment(state[k].reshape(-1), s, k != "exp_avg")
        for k, s in zip(("exp_avg", "exp_avg_sq"), scales)
    ]
    p = p.detach()
    weight = join_master(p, state["remainder"]) if "remainder" in state else state.get("master", p.float())
    return *moments, weight.flatten()


# ---------------------------------------------------------------- form


@pytest.mark.parametrize("dtype", (BF16, F16, F32, F64))
@pytest.mark.parametrize("moments, masters", FORMS)
def test_resume_is_bit_for_bit(device, dtype, moments, masters):
    """Eight steps equal three, a save, and five in new objects; the state is as layout() says."""
    form = {"moments": moments, "masters": masters, "seed": 5}
    whole, optimizer = trained(dtype, device, steps=8, **form)
    first, halfway, scheduler = start(dtype, device, **form)
    train(first, halfway, scheduler, 3)
    second = twin(first)
    resumed = AdamW(decay_groups(second, 0.1), lr=1e-2, **form)
    next_scheduler = schedule(resumed)
    for thing, old in ((resumed, halfway), (next_scheduler, scheduler)):
        thing.load_state_dict(saved(old))
    assert equal_states(halfway, resumed)
    train(second, resumed, next_scheduler, 5, first=3)
    assert equal_states(optimizer, resumed)
    for p, q in zip(whole.parameters(), second.parameters()):
        assert torch.equal(p, q)
        layout = resumed.layout(q)
        assert {k: (tuple(t.shape), t.dtype) for k, t in resumed.state[q].items()} == layout


@pytest.mark.parametrize("moments, masters", FORMS)
def test_the_form_is_the_instances_own(moments, masters):
    """A copy has it; a loaded state dict doesn't change it."""
    net, optimizer = trained(BF16, "cpu", moments, masters, seed=7)
    _, other = trained(BF16, "cpu")
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (copied.moments, copied.masters, copied.seed, copied.capturable) == (
            moments,
            masters,
            7,
            False,
        )
        assert equal_states(copied, optimizer)
        for p in copied.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        copied.step()
    optimizer.load_state_dict(saved(other))
    assert (optimizer.moments, optimizer.masters, optimizer.seed) == (moments, masters, 7)
    assert all(
        optimizer.state[p][k].dtype == d
        for p in net.parameters()
        for k, (_, d) in optimizer.layout(p).items()
    )
    assert not {"moments", "masters", "seed"} & optimizer.param_groups[0].keys()


@pytest.mark.parametrize(
    "dtype, form, expected",
    [
        (BF16, {}, 14), (BF16, {"masters": "remainder"}, 12), (BF16, {"masters": "none"}, 10),
        (BF16, {"moments": "bf16"}, 10), (BF16, {"moments": "bf16", "masters": "none"}, 6),
        (BF16, LEAN, 6.03125), (F32, LEAN, 6.03125), (F16, LEAN, 8.03125), (F64, LEAN, 24),
    ],
)  # fmt: skip
def test_state_bytes(device, dtype, form, expected):
    p = nn.Parameter(torch.zeros(512, 1024, dtype=dtype, device=device))
    optimizer = AdamW([p], **form)
    assert optimizer.state_bytes() == pytest.approx(expected)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    held = p.nbytes + sum(t.untyped_storage().nbytes() for k, t in optimizer.state[p].items() if k != "step")
    assert held / p.numel() == optimizer.state_bytes()
    assert dtype != BF16 or form != LEAN or optimizer.state_bytes() <= 6.1


def test_one_call_for_all_groups_of_a_dtype(monkeypatch):
    calls = []
    monkeypatch.setattr("openllama.optim.adamw", lambda params, *a, **k: calls.append((params, k)))
    params = [
        nn.Parameter(torch.zeros(n, dtype=d))
        for n, d in ((300, F32), (5, BF16), (7, F32), (0, F32), (2, F32))
    ]
    for p in params[1:]:
        p.grad = torch.zeros_like(p)
    AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.5, "weight_decay": 0.0}], lr=0.1).step()
    (half, options), (full, others) = calls
    assert len(half) == 1 and len(full) == 3
    assert options["firsts"] == [300] and others["firsts"] == [305, 312, 312], (
        "frozen and idle ones count too"
    )
    assert (options["lr"], others["lr"], others["weight_decay"], others["groups"]) == (
        [0.1],
        [0.5],
        [0.0],
        [0, 0, 0],
    )


def test_a_gradient_scale(device):
    """Nothing is written to the gradients."""
    nets = model(BF16, device), model(BF16, device)
    for net, factor in zip(nets, (1.0, 0.25)):
        optimizer = AdamW(net.parameters(), lr=1e-2, **LEAN)
        for p in net.parameters():
            p.grad = random(p.shape, BF16, device, p.numel()) * factor
        before = [p.grad.clone() for p in net.parameters()]
        optimizer.step(grad_scale=None if factor < 1 else torch.tensor(0.25, device=device))
        assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before))
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize(
    "option", ({"moments": "int4"}, {"masters": "bf16"}, {"seed": -1}, {"seed": 2**32}, {"seed": 0.5})
)
def test_bad_options_are_named(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}: got {value!r}, takes"):
        AdamW(model().parameters(), **option)


# ---------------------------------------------------------------- conversion


@pytest.mark.parametrize("source, target", list(product(FORMS, FORMS)))
def test_state_of_one_form_becomes_anothers(source, target):
    net, optimizer = trained(BF16, "cpu", *source)
    other = twin(net)
    converted = AdamW(decay_groups(other, 0.1), moments=target[0], masters=target[1])
    converted.load_state_dict(saved(optimizer))
    for p, q in zip(net.parameters(), other.parameters()):
        old, new = fp32_state(p, optimizer.state[p]), fp32_state(q, converted.state[q])
        for row, (a, b) in enumerate(zip(old[:2], new[:2])):
            if target[0] == source[0] or target[0] == "fp32":
                assert torch.equal(a, b)
            elif target[0] == "bf16":
                assert torch.equal(b, a.bfloat16().float()) or (a - b).abs().max() <= 2**-8 * a.abs().max()
            else:
                assert (a - b).abs().max() <= (0.06 if row else 0.008) * a.abs().max()
        if target[1] == "none":
            assert torch.equal(new[2].bfloat16(), p.detach().flatten())
        else:
            assert torch.equal(old[2], new[2]), "masters are exact"
    train(other, converted, schedule(converted), 1)


def test_ties_between_bf16_numbers_survive_the_way_to_remainders_and_back():
    p = nn.Parameter(torch.zeros(2**10, dtype=BF16))
    fp32, lean = AdamW([p]), AdamW([p], masters="remainder")
    p.grad = torch.zeros_like(p)
    fp32.step()
    bits = torch.arange(0x3F800000, 0x3F800000 + 2**10 * 0x8000, 0x8000, dtype=torch.int32)
    master = bits.view(F32) * torch.where(bits % 3 == 0, 1.0, -1.0)
    fp32.state[p]["master"].copy_(master)
    p.data.copy_(master)
    assert not torch.equal(p.detach(), split_master(master)[0]), "ties to even differ"
    lean.load_state_dict(fp32.state_dict())
    assert torch.equal(join_master(p.detach(), lean.state[p]["remainder"]), master)
    fp32.load_state_dict(lean.state_dict())
    assert torch.equal(fp32.state[p]["master"], master)


def test_torchs_state_gets_eight_bits(device):
    net = model(BF16, device)
    theirs = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, theirs, schedule(theirs), 2)
    ours = AdamW(net.parameters(), **LEAN)
    ours.load_state_dict(theirs.state_dict())
    for p in net.parameters():
        mean, square, weight = fp32_state(p, ours.state[p])
        near(mean, theirs.state[p]["exp_avg"].float().flatten(), 2**17)
        near(square, theirs.state[p]["exp_avg_sq"].float().flatten(), 2**19)
        assert torch.equal(weight, p.detach().float().flatten())
    train(net, ours, schedule(ours), 1)


BAD = {
    "an unknown entry": (F32, lambda s: s.update(max_exp_avg_sq=s["exp_avg"]), "state of parameter 1: got 'max_exp_avg_sq', takes step,"),
    "no second moment": (F32, lambda s: s.pop("exp_avg_sq"), "state of parameter 1: got no 'exp_avg_sq'"),
    "no scales": (F32, lambda s: s.update(exp_avg=s["exp_avg"].byte()), "got no 'scales'"),
    "a shape": (F32, lambda s: s.update(exp_avg=s["exp_avg"][:1]), r"exp_avg: got shape \(1, 5\), takes \(3, 5\)"),
    "a dtype": (F32, lambda s: s.update(exp_avg=s["exp_avg"].int()), "exp_avg: got torch.int32, takes torch.float32"),
    "a master": (F32, lambda s: s.update(master=s["exp_avg"]), "got a master, of a torch.bfloat16 or torch.float16 parameter; takes none for torch.float32"),
    "a remainder": (F16, lambda s: s.update(remainder=s["exp_avg"].short()), "got a remainder, of a torch.bfloat16 parameter; takes none for torch.float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_state_that_can_not_be_converted_is_named_and_nothing_changed(name):
    dtype, spoil, message = BAD[name]
    _, optimizer = trained(dtype, "cpu")
    file = saved(optimizer)
    file["param_groups"] = [{**g, "lr": 0.5} for g in file["param_groups"]]
    spoil(file["state"][1])
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(file)
    assert equal_states(optimizer, before) and optimizer.param_groups[0]["lr"] != 0.5


# ---------------------------------------------------------------- capturable


@pytest.mark.parametrize(
    "dtype, form", ((F32, {}), (BF16, {}), (BF16, LEAN), (BF16, {"moments": "bf16", "masters": "none"}))
)
def test_capturable_equals_the_other(device, dtype, form):
    """With a scheduler, and with a rate that is written to the group."""
    nets = [model(dtype, device) for _ in range(2)]
    pair = [AdamW(decay_groups(n, 0.1), lr=1e-2, capturable=c, **form) for n, c in zip(nets, (True, False))]
    for net, optimizer in zip(nets, pair):
        train(net, optimizer, schedule(optimizer), 4)
        optimizer.param_groups[0]["lr"] = 5e-3
        train(net, optimizer, schedule(optimizer), 2, first=4)
    for a, b in zip(*(n.parameters() for n in nets)):
        near(a.detach(), b.detach(), 2 if dtype == BF16 else 16)
    steps = [s["step"] for s in state_of(pair[0])]
    assert {float(s) for s in steps} == {6.0} and all(s.device.type == device for s in steps)
    assert pair[0].param_groups[0]["lr"].device.type == device
    resumed_net = twin(nets[0])
    resumed = AdamW(decay_groups(resumed_net, 0.1), capturable=True, **form)
    resumed.load_state_dict(saved(pair[0]))
    for net, optimizer in ((nets[0], pair[0]), (resumed_net, resumed)):
        train(net, optimizer, schedule(optimizer), 2, first=6)
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), resumed_net.parameters()))


def test_capturable_counts_a_groups_steps(device):
    early, late = (nn.Parameter(random((n,), F32, device, n)) for n in (3, 4))
    other = nn.Parameter(random((5,), F32, device, 5))
    optimizer = AdamW([{"params": [early, late]}, {"params": [other]}], capturable=True)
    for step in range(3):
        early.grad = torch.ones_like(early)
        late.grad = torch.ones_like(late) if step == 2 else None
        other.grad = torch.ones_like(other) if step == 1 else None
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in (early, late, other)] == [3, 3, 1]
    file = optimizer.state_dict()
    file["state"][0] = {**file["state"][0], "step": torch.tensor(9.0)}
    with pytest.raises(
        ValueError, match="state of parameters 0 to 1: got the steps 3, 9, takes one step for each group"
    ):
        optimizer.load_state_dict(file)
    plain = AdamW([{"params": [early, late]}, {"params": [other]}])
    plain.load_state_dict(file)
    assert [int(plain.state[p]["step"]) for p in (early, late, other)] == [9, 3, 1]
    assert isinstance(plain.param_groups[0]["lr"], float)


def test_capturable_takes_one_device():
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))]
    with pytest.raises(ValueError, match="capturable: got parameters on cpu and meta, takes one device"):
        AdamW(params, capturable=True).step()


@pytest.mark.gpu
@pytest.mark.parametrize("form", ({}, LEAN))
def test_a_step_in_a_cuda_graph(form):
    """Replays read the learning rate, count their steps, and draw new bits; neither they nor plain steps wait."""
    nets = [model(BF16, "cuda") for _ in range(2)]
    graphed = AdamW(decay_groups(nets[0], 0.1), lr=1e-2, capturable=True, **form)
    plain = AdamW(decay_groups(nets[1], 0.1), lr=1e-2, **form)
    scale = torch.tensor(0.5, device="cuda")
    for net in nets:
        for p in net.parameters():
            p.grad = random(p.shape, F32, "cuda", p.numel()).to(BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graphed.step(grad_scale=scale)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step(grad_scale=scale)
    plain.step(grad_scale=scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in (1e-2, 1e-3, 1e-1):
            for group in graphed.param_groups:
                group["lr"].fill_(lr)
            graph.replay()
            for group in plain.param_groups:
                group["lr"] = lr
            plain.step(grad_scale=scale)
        graphed.step(grad_scale=scale), plain.step(grad_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {float(s["step"]) for o in (graphed, plain) for s in state_of(o)} == {5.0}
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        near(a.detach(), b.detach(), 1)


# ---------------------------------------------------------------- keys


def test_bits_do_not_depend_on_who_has_a_gradient_or_on_groups(device):
    """An element is known by its number in the order of all parameters."""
    results = []
    for frozen, groups in ((False, 1), (True, 1), (True, 3)):
        params = [nn.Parameter(random((n, 300), BF16, device, n)) for n in (2, 3, 4)]
        params[0].requires_grad_(not frozen)
        ends = [params] if groups == 1 else [[p] for p in params]
        optimizer = AdamW([{"params": g} for g in ends], lr=1e-2, moments="8bit", masters="none", seed=3)
        for step in range(3):
            for p in params[frozen:]:
                p.grad = random(p.shape, BF16, device, step)
            optimizer.step()
        results.append([params[1].detach(), params[2].detach()])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))
