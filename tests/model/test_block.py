"""The hand-written halves of a block: the gradients of autograd, whatever is kept and whoever adds them up."""

import pytest
import torch

from openllama import block
from openllama.ops import attention, rms_norm, rotary, rotary_tables, swiglu
from openllama.training.step import accumulate_gradients

from .models import make

RECOMPUTE = ("none", "norm", "mlp", "full")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
HIDDEN, TOKENS = 32, 24
HEADS = block.Heads(4, 2, 16)
EPS = 1e-5


def sequences(packed, device):
    cos, sin = rotary_tables(HEADS.head_dim, 64, device=device)
    if packed:
        borders = torch.tensor([0, 10, 10, 17, TOKENS], dtype=torch.int32, device=device)
        places = torch.cat([torch.arange(n) for n in (10, 7, 7)])
        return block.Sequences(places.to(device, torch.int32), cos, sin, borders, 10, None)
    places = torch.arange(TOKENS // 2, dtype=torch.int32, device=device).repeat(2)
    return block.Sequences(places, cos, sin, None, TOKENS // 2, (2, TOKENS // 2))


class Case:
    """A half and the same of single ops, which autograd takes apart."""

    def __init__(self, kind, device, dtype=torch.float64, residual=True, parts=1, biases=False, packed=True):
        self.kind, self.sequences = kind, sequences(packed, device)
        width = HEADS.heads * HEADS.head_dim if kind == "attention" else 40
        rows = [64, 32, 32] if kind == "attention" else [40, 40]
        rows = [sum(rows)] if parts == 1 else rows
        g = torch.Generator().manual_seed(0)

        def tensor(*shape, scale=1.0):
            t = torch.randn(shape, generator=g, dtype=torch.float64) * scale
            return t.to(device, dtype).requires_grad_()

        self.branch = tensor(TOKENS, HIDDEN)
        self.residual = tensor(TOKENS, HIDDEN) if residual else None
        self.norm = tensor(HIDDEN)
        self.w_in = [tensor(n, HIDDEN, scale=0.2) for n in rows]
        self.b_in = [tensor(n) for n in rows] if biases else []
        self.w_out = tensor(HIDDEN, width, scale=0.2)
        self.douts = [tensor(TOKENS, HIDDEN).detach() for _ in range(2)]

    @property
    def leaves(self):
        own = [self.branch, self.residual, self.norm, *self.w_in, *self.b_in, self.w_out]
        return [t for t in own if t is not None]

    def by_hand(self, recompute="norm", accumulate=False):
        middle = block.Attention(HEADS, self.sequences) if self.kind == "attention" else block.Swiglu()
        settings = block.Settings(recompute, accumulate)
        inputs = (self.branch, self.residual, self.norm, self.w_in, self.w_out, EPS, settings, self.b_in)
        return block.half(middle, *inputs)

    def by_autograd(self):
        h = self.branch if self.residual is None else self.branch + self.residual
        y = rms_norm(h, self.norm, EPS)
        inner = y @ torch.cat(self.w_in).t()
        inner = inner + torch.cat(self.b_in) if self.b_in else inner
        s = self.sequences
        if self.kind == "mlp":
            return swiglu(inner) @ self.w_out.t(), h
        heads = inner.view(TOKENS, HEADS.heads + 2 * HEADS.kv_heads, HEADS.head_dim)
        heads = rotary(heads, s.cos, s.sin, s.positions, HEADS.heads + HEADS.kv_heads)
        heads = heads if s.dense_shape is None else heads.view(*s.dense_shape, *heads.shape[1:])
        q, k, v = heads.split([HEADS.heads, HEADS.kv_heads, HEADS.kv_heads], dim=-2)
        return attention(q, k, v, s.cu_seqlens, s.max_seqlen).reshape(TOKENS, -1) @ self.w_out.t(), h


KINDS = [
    {"kind": kind, **rest}
    for kind in ("attention", "mlp")
    for rest in ({}, {"residual": False}, {"parts": 2, "biases": True}, {"packed": False})
]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradients_are_autograds(device, options, recompute):
    case = Case(device=device, **options)
    expected = case.by_autograd()
    expected_grads = torch.autograd.grad(expected, case.leaves, case.douts)
    got = case.by_hand(recompute)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, case.leaves, case.douts), expected_grads)
    with torch.no_grad():
        torch.testing.assert_close(case.by_hand(recompute), expected)


@pytest.mark.parametrize("kind", ("attention", "mlp"))
@pytest.mark.parametrize("device", DEVICES)
def test_only_what_is_needed_gets_a_gradient(device, kind):
    case = Case(kind, device, parts=2, biases=True)
    grads = torch.autograd.grad(case.by_hand(), case.leaves, case.douts)
    for kept in range(len(case.leaves)):
        for i, leaf in enumerate(case.leaves):
            leaf.requires_grad_(i == kept).grad = None
        torch.autograd.backward(case.by_hand(), case.douts)
        torch.testing.assert_close(case.leaves[kept].grad, grads[kept])
        assert all(leaf.grad is None for i, leaf in enumerate(case.leaves) if i != kept)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", ("attention", "mlp"))
@pytest.mark.parametrize("device", DEVICES)
def test_accumulated_gradients_are_the_returned_ones(device, kind, dtype):
    case = Case(kind, device, dtype, parts=2, biases=True)
    weights = [case.norm, *case.w_in, *case.b_in, case.w_out]
    for weight in weights:
        weight.grad_dtype = torch.float32
    returned = torch.autograd.grad(case.by_hand(), weights, case.douts)
    for times in (1, 2, 3):
        torch.autograd.backward(case.by_hand(accumulate=True), case.douts)
        for weight, grad in zip(weights, returned):
            assert weight.grad.dtype == torch.float32
            eps = torch.finfo(dtype).eps if weight.dim() == 1 else 1e-6  # vectors are rounded when returned
            gap = (weight.grad.double() - times * grad.double()).abs().max()
            assert gap <= 4 * times * eps * grad.double().abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_what_is_made_again_has_the_same_bits(device, dtype, kind):
    """A model's gradients do not depend on what its blocks keep."""
    ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
    all_grads = []
    for recompute in RECOMPUTE:
        model = make(dtype, **kind).to(device)
        model.settings = model.settings._replace(recompute=recompute)
        accumulate_gradients(model)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            model(ids, labels=ids.roll(-1, 1), scale=torch.full((), 1 / 24, device=device)).backward()
        finally:
            torch.use_deterministic_algorithms(False)
        all_grads.append([p.grad for p in model.parameters()])
    for grads in all_grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, all_grads[0]))


@pytest.mark.parametrize("kind", ("attention", "mlp"))
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_have_no_strides(device, kind):
    """CASES 3: those of a sum."""
    case = Case(kind, device, torch.float32)
    grads = []
    for outputs in (case.by_autograd(), case.by_hand()):
        grads.append(torch.autograd.grad(sum(out.sum() for out in outputs), case.leaves))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_weights_computed_from_others_get_their_gradients():
    """They have no `.grad` to add to."""
    case = Case("mlp", "cpu")
    sources = [case.w_out, *case.w_in]
    case.w_out, *case.w_in = (w * 2 for w in sources)
    expected = torch.autograd.grad(case.by_autograd(), sources, case.douts, retain_graph=True)
    torch.autograd.backward(case.by_hand(accumulate=True), case.douts)
    torch.testing.assert_close([w.grad for w in sources], list(expected))


def test_a_compiled_model_trains_after_accumulate_gradients():
    models = [make(torch.bfloat16, tied=True) for _ in range(2)]
    ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    for model, run in zip(models, (models[0], torch.compile(models[1], backend="aot_eager"))):
        accumulate_gradients(model)
        run(ids, labels=ids).backward()
    for ours, theirs in zip(models[1].parameters(), models[0].parameters()):
        assert (ours.grad - theirs.grad).norm() <= 0.02 * theirs.grad.norm()


def test_sharded_in_mixed_precision():
    """FSDP2 casts what it finds in a layer's arguments; rotary tables have to stay fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model, plain = make(), make(torch.bfloat16)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))
        losses = [m(ids, labels=ids) for m in (model, plain)]
        torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
        losses[0].backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_a_second_backward_raises():
    case = Case("mlp", "cpu")
    out, _ = case.by_hand()
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a block's backward ran a second time"):
        out.sum().backward()


def test_a_scaled_loss_is_refused_where_gradients_are_made_in_forward():
    model = make()
    accumulate_gradients(model)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="got a scaled loss, takes the scale as weights"):
        (model(ids, labels=ids) / 4).backward()


@pytest.mark.gpu
def test_less_is_kept_the_more_is_made_again():
    kept = []
    ids = torch.randint(0, 101, (2, 512), device="cuda")
    model = make(torch.bfloat16, hidden=256, intermediate=1024, max_positions=512, layers=4).to("cuda")
    for recompute in RECOMPUTE:
        model.settings = model.settings._replace(recompute=recompute)
        before = torch.cuda.memory_allocated()
        hidden = model.hidden_states(ids)
        kept.append(torch.cuda.memory_allocated() - before)
        del hidden
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.3 * kept[0]
