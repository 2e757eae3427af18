"""embedding: rows by id, and the deterministic fp32 sum of their gradients."""

import pytest
import torch
import torch.nn.functional as F

from openllama.ops import embedding

from .contract import BF16, F16, F32, F64, Contract
from .rule import all_near, near, random, run

IDS = 7


def ids_for(rows, device, seed, vocab=IDS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (rows,), generator=generator).to(device)


class TestEmbedding(Contract):
    sizes = (16, 1, 7, 123, 256, 4096)  # hidden; few ids, so that gradients add up
    terms = 16.0  # of a row's gradient, which may cancel

    def make(self, rows, size, dtype, device, seed=0):
        return [random((IDS, size), dtype, device, seed)], (ids_for(rows, device, seed),)

    def op(self, weight, ids, backend=None):
        return embedding(ids, weight, backend=backend)

    def eager(self, weight, ids):
        return F.embedding(ids, weight)

    def fuzz_size(self, rng):
        return rng.choice((1, 2, 3, 8, 15, 16, 17, 64, 65, 300))

    def raw(self, device, dtype):
        if device == "cpu" or dtype == F64:
            pytest.skip("the reference does it")
        ids, order = ids_for(9, device, 0).sort(stable=True)
        dy = random((9, 40), dtype, device, 1)[:, 3:20]
        op = torch.ops.openllama.embedding_bwd_.default
        return [(op, (torch.zeros(IDS, 17, dtype=to, device=device), dy, ids, order)) for to in {dtype, F32}]


@pytest.mark.parametrize("shape", ((), (5,), (2, 3), (0,), (2, 0)))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_any_shape_of_ids(device, shape, dtype):
    weight, ids = random((IDS, 16), F32, device, 0), torch.full(shape, 3, dtype=dtype, device=device)
    ours = run(lambda w: embedding(ids, w), [weight])
    theirs = run(lambda w: w[ids.long()], [weight])
    assert ours[0][0].shape == (*shape, 16)
    all_near(ours[0] + ours[1], theirs[0] + theirs[1], 2)


@pytest.mark.parametrize("dtype", (BF16, F16))
@pytest.mark.parametrize("grad_dtype", ("own", "fp32"))
def test_a_frequent_id_loses_no_gradient(device, dtype, grad_dtype):
    """20,000 ones, and one id by itself: sums in bf16 would stall at 256. fp32 where the weight takes that."""
    ids = torch.tensor([2] * 20_000 + [5], device=device)
    weight = torch.nn.Parameter(random((IDS, 16), dtype, device, 0))
    if grad_dtype == "fp32":
        weight.grad_dtype = F32
    embedding(ids, weight).sum().backward()
    assert weight.grad.dtype == (F32 if grad_dtype == "fp32" else dtype)
    expected = torch.zeros(IDS, 16, device=device)
    expected[2], expected[5] = 20_000, 1
    assert torch.equal(weight.grad, expected.to(weight.grad.dtype))


def test_the_gradient_in_fp32_is_rounded_nowhere(device):
    """Of bf16 gradients whose sum bf16 can't hold."""
    weight = torch.nn.Parameter(random((IDS, 16), BF16, device, 0))
    weight.grad_dtype = F32
    ids, dy = ids_for(1000, device, 1), random((1000, 16), BF16, device, 2)
    embedding(ids, weight).backward(dy)
    exact = torch.zeros(IDS, 16, dtype=F64, device=device).index_add_(0, ids, dy.double())
    near(weight.grad, exact.float(), 16)


@pytest.mark.parametrize("first", (0, 2))
def test_an_id_that_is_not_used_gets_0(device, first):
    ids = torch.tensor([4, 1, 4], device=device) + first
    (grad,) = run(lambda w: embedding(ids, w), [random((IDS + 2, 16), F32, device, 0)])[1]
    used = grad.any(1)
    assert used.nonzero().flatten().tolist() == [1 + first, 4 + first]


def test_every_id_once_and_one_id_alone(device):
    weight, dy = random((1000, 16), F32, device, 0), random((1000, 16), F32, device, 1)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).to(device)
    (grad,) = run(lambda w: embedding(order, w), [weight], douts=[dy])[1]
    assert torch.equal(grad[order], dy)
    (grad,) = run(lambda w: embedding(order * 0 + 999, w), [weight], douts=[dy])[1]
    near(grad[999], dy.double().sum(0).float(), 16)
    assert not grad[:999].any()


@pytest.mark.parametrize("wrong", (IDS, -1, 2**40))
def test_an_id_outside_is_named(wrong):
    ids = torch.tensor([[0, 1], [wrong, 2]])
    with pytest.raises(ValueError, match=f"ids: got {wrong}, takes 0 to {IDS - 1}"):
        embedding(ids, random((IDS, 16), F32, "cpu", 0))


WEIGHT, SOME_IDS = torch.zeros(7, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((SOME_IDS.float(), WEIGHT), {}, TypeError, "ids: got torch.float32, takes int32 or int64"),
        (([0, 1], WEIGHT), {}, TypeError, "ids: got list, takes a tensor"),
        ((SOME_IDS, WEIGHT.long()), {}, TypeError, "weight: got torch.int64"),
        ((SOME_IDS, WEIGHT[0]), {}, ValueError, r"weight: got shape \(4,\), takes \(vocab, hidden\)"),
        ((SOME_IDS, WEIGHT.to("meta")), {}, ValueError, "ids: got a tensor on cpu, takes weight's meta"),
        ((SOME_IDS, WEIGHT), {"backend": "cpu"}, ValueError, "embedding has no cpu kernel"),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        embedding(*arguments, **options)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_accumulate_adds_to_the_gradient_itself(device, dtype):
    """In fp32 where the weight takes that, in the memory kept for it; autograd gets none."""
    weight = torch.nn.Parameter(random((IDS, 40), dtype, device, 0))
    weight.grad_dtype = F32
    pieces = [(ids_for(9, device, i), random((9, 40), dtype, device, i)) for i in range(3)]
    exact = torch.zeros(IDS, 40, dtype=F64, device=device)
    weight.grad_buffer = torch.full((IDS, 40), float("nan"), device=device)
    for ids, dy in pieces:
        y = embedding(ids, weight, accumulate=True)
        y.backward(dy)
        exact.index_add_(0, ids, dy.double())
        assert weight.grad is weight.grad_buffer
        torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-6, atol=1e-6)
