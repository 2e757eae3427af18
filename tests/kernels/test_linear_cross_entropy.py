"""linear_cross_entropy: the head and its loss in chunks of tokens, against F.linear and cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from openllama.kernels import library
from openllama.kernels.linear_cross_entropy import _chunk_tokens
from openllama.ops import cross_entropy, embedding, linear_cross_entropy

from .contract import BF16, F16, F32, F64, Contract
from .rule import all_near, near, random, run
from .test_cross_entropy import definition, labels_for

REDUCTIONS = ("none", "mean", "sum")


def inputs(rows, hidden, vocab, dtype, device, seed=0):
    """h and weight, whose logits are of the size of 4, and labels."""
    tensors = [
        random((rows, hidden), dtype, device, seed),
        random((vocab, hidden), dtype, device, seed + 1, scale=4 * hidden**-0.5),
    ]
    return tensors, (labels_for(rows, vocab, device, seed),)


class TestLinearCrossEntropy(Contract):
    sizes = ((16, 41), (1, 2), (7, 123), (64, 1000))  # hidden, vocabulary
    chunk_tokens = 8
    reduction = "sum"
    fuzz_cases = 50
    factor = 1.01  # the rounding of the logits, which both sides share, is most of the error
    fuzz_ulps = 16.0  # the order of a product's sums is another one, and so is that of the chunks
    layout_ulps = 4.0
    forward_ulps = 4.0  # it is another kernel, which adds up a row in another order
    terms = 8.0  # of a gradient over weight: a row's h, of either sign

    def make(self, rows, size, dtype, device, seed=0):
        return inputs(rows, *size, dtype, device, seed)

    def op(self, h, weight, labels, backend=None):
        return linear_cross_entropy(
            h, weight, labels, reduction=self.reduction, chunk_tokens=self.chunk_tokens, backend=backend
        )

    def eager(self, h, weight, labels):
        logits = F.linear(h, weight)
        wide = logits if logits.dtype == F64 else logits.float()
        return F.cross_entropy(wide, labels, reduction=self.reduction)

    def floor(self, size):
        return 8.0

    def fuzz_size(self, rng):
        return rng.choice((1, 2, 3, 8, 17, 64)), rng.choice((2, 3, 17, 127, 500))

    def raw(self, device, dtype):
        if dtype == F64 or (device == "cpu" and dtype == F16):
            pytest.skip("the reference does it")
        (h, weight), (labels, *_) = self.make(9, self.sizes[0], dtype, device)
        dloss, op = torch.rand(9, device=device), torch.ops.openllama.linear_cross_entropy.default
        chosen = "cpu" if device == "cpu" else "cuda"
        return [
            (op, (h, weight, labels, weights, -100, 3.0, 1e-2, 4, *needs, chosen))
            for weights, needs in ((None, (True, True)), (dloss, (True, False)), (dloss, (False, True)), (None, (False, False)))
        ]  # fmt: skip

    test_layout_of_output_gradients = None  # the output is a scalar


class TestLinearCrossEntropyRows(TestLinearCrossEntropy):
    """A loss for each token, of three leading dimensions."""

    sizes = ((16, 41), (64, 1000))
    reduction = "none"

    def op(self, h, weight, labels, backend=None):
        losses = super().op(h[None, :, None], weight, labels[None, :, None], backend)
        return losses[0, :, 0]

    test_layout_of_output_gradients = Contract.test_layout_of_output_gradients
    test_opcheck = test_fake_has_the_real_strides = test_rows_beyond_2_to_the_31_elements = None


class TestLinearCrossEntropyOptions(TestLinearCrossEntropy):
    """softcap, z_loss and weights."""

    sizes = ((16, 41), (64, 1000))
    reduction = "mean"
    numbers = (10.0, 1e-2)

    def make(self, rows, size, dtype, device, seed=0):
        tensors, (labels,) = super().make(rows, size, dtype, device, seed)
        if rows:
            labels[0] = size[1] - 1  # a row that counts
        return tensors, (labels, random((rows,), F32, device, seed + 1).abs() + 0.1)

    def op(self, h, weight, labels, weights, backend=None):
        softcap, z_loss = self.numbers
        return linear_cross_entropy(
            h, weight, labels, weights=weights, softcap=softcap, z_loss=z_loss, reduction=self.reduction,
            chunk_tokens=self.chunk_tokens, backend=backend,
        )  # fmt: skip

    def eager(self, h, weight, labels, weights):
        return definition(F.linear(h, weight), labels, weights, *self.numbers, self.reduction)

    test_opcheck = test_fake_has_the_real_strides = test_rows_beyond_2_to_the_31_elements = None


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_size_of_a_chunk_changes_nothing(device, dtype, reduction):
    tensors, constants = inputs(33, 16, 123, dtype, device)

    def with_chunks(of):
        return run(
            lambda *a: linear_cross_entropy(*a, reduction=reduction, chunk_tokens=of), tensors, constants
        )

    whole = with_chunks(None)
    for of in (1, 5, 11, 32, 33, 1000):
        chunked = with_chunks(of)
        all_near(chunked[0], whole[0], 4)
        # a GPU's products of another size may be summed in another order
        all_near(chunked[1], whole[1], 16 if dtype == F32 else 2, f"chunks of {of}")


def test_no_gradient_of_the_weight_is_lost_over_many_chunks(device):
    """Sums in bf16 over 500 chunks would stall: the sum is in fp32 and rounded once."""
    (h, weight), (labels,) = inputs(500, 16, 41, BF16, device)
    tensors = [h.abs(), weight]

    def gradient(tensors, chunk_tokens):
        options = {"reduction": "sum", "chunk_tokens": chunk_tokens}
        return run(linear_cross_entropy, tensors, (labels,), douts=[torch.ones(())], **options)[1][1]

    near(gradient(tensors, 1), gradient(tensors, 500), 1)


@pytest.mark.parametrize(
    "tokens, vocab, itemsize, expected",
    [
        (8192, 100_000, 2, 4096),
        (8192, 128_256, 2, 2816),  # three
        (8200, 100_000, 2, 4224),
        (4294, 100_000, 2, 4294),  # all that fit
        (2048, 32_000, 2, 2048),
        (100, 32_000, 4, 128),
        (5, 2**31, 4, 1),
        (0, 32_000, 4, 128),
    ],
)
def test_chunks_are_few_equal_and_below_a_gigabyte(tokens, vocab, itemsize, expected):
    assert _chunk_tokens(tokens, vocab, itemsize, "cuda") == expected
    assert _chunk_tokens(tokens, vocab, itemsize, "cpu") <= min(expected, 1024)
    assert expected * vocab * itemsize <= 0.8 * 2**30 or expected == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_chunks_of_logits_share_one_buffer(device, monkeypatch, reduction):
    seen, ops = [], library.ops

    class Watched:
        def __init__(self, backend):
            self.ops = ops(backend)

        def __getattr__(self, name):
            return lambda logits, *rest: seen.append(logits) or getattr(self.ops, name)(logits, *rest)

    monkeypatch.setattr(library, "ops", Watched)
    tensors, constants = inputs(60, 4, 500, F32, device)
    run(lambda *a: linear_cross_entropy(*a, reduction=reduction, chunk_tokens=8), tensors, constants)
    assert len(seen) == (16 if reduction == "none" else 8) and {len(t) for t in seen} == {8, 4}
    for passes in (seen[:8], seen[8:]):
        assert len({t.data_ptr() for t in passes}) <= 1


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("needs", ((True, True), (True, False), (False, True), (False, False)))
def test_only_what_is_asked_for_is_saved(device, needs):
    tensors, constants = inputs(9, 16, 41, F32, device)
    leaves, kept = [t.requires_grad_(need) for t, need in zip(tensors, needs)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = linear_cross_entropy(*leaves, *constants)
    assert sum(kept) == sum(t.numel() for t, need in zip(leaves, needs) if need)
    assert loss.requires_grad == any(needs)


@pytest.mark.parametrize("dtype", (BF16, F16))
def test_the_weights_gradient_is_fp32_where_it_takes_that(device, dtype):
    if device == "cpu" and dtype == F16:
        pytest.skip("fp16 runs on the reference here")
    (h, values), constants = inputs(33, 16, 123, dtype, device)
    grads = []
    for grad_dtype in (dtype, F32):
        weight = torch.nn.Parameter(values.clone())
        weight.grad_dtype = grad_dtype
        (linear_cross_entropy(h, weight, *constants, chunk_tokens=8) / 3).backward()
        assert weight.grad.dtype == grad_dtype
        grads.append(weight.grad)
    assert torch.equal(grads[0], grads[1].to(dtype)) and not torch.equal(grads[0].float(), grads[1])


@pytest.mark.parametrize("grad_dtype", (BF16, F32))
def test_a_weight_that_is_the_embedding_too(device, grad_dtype):
    """Both gradients add up in the weight's .grad."""
    _, (labels,) = inputs(33, 16, 41, BF16, device)
    ids, values = labels.clamp(min=0), random((41, 16), BF16, device, 1)

    def gradient(loss):
        weight = torch.nn.Parameter(values.clone())
        weight.grad_dtype = grad_dtype
        loss(weight).backward()
        return weight.grad

    def embed(w):
        return embedding(ids, w)

    both = gradient(lambda w: linear_cross_entropy(embed(w), w, labels, reduction="sum", chunk_tokens=8))
    head = gradient(
        lambda w: linear_cross_entropy(embed(w.detach()), w, labels, reduction="sum", chunk_tokens=8)
    )
    below = gradient(
        lambda w: linear_cross_entropy(embed(w), w.detach(), labels, reduction="sum", chunk_tokens=8)
    )
    assert both.dtype == grad_dtype and torch.equal(both, head + below)


def test_the_gradient_of_a_parameter_is_not_copied(device):
    """What forward made becomes .grad."""
    (h, weight), constants = inputs(9, 16, 41, F32, device)
    weight, kept = torch.nn.Parameter(weight), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        loss = linear_cross_entropy(h, weight, *constants)
    loss.backward()
    assert weight.grad.data_ptr() in kept


@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_a_second_backward_raises(device, reduction):
    tensors, constants = inputs(9, 16, 41, F32, device)
    loss = linear_cross_entropy(*[t.requires_grad_() for t in tensors], *constants, reduction=reduction)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_labels_ignored(device, reduction):
    tensors, _ = inputs(9, 16, 41, F32, device)
    labels = torch.full((9,), -100, device=device)
    outputs, grads = run(lambda *a: linear_cross_entropy(*a, reduction=reduction), tensors, (labels,))
    assert not any(t.count_nonzero() for t in (*outputs, *grads))


@pytest.mark.gpu
def test_fp16_keeps_gradients_that_a_mean_would_round_to_0():
    """1 / tokens goes to the products' results, not into the fp16 logits."""
    (h, weight), _ = inputs(4096, 16, 1000, F16, "cuda")
    labels = torch.zeros(4096, dtype=torch.long, device="cuda")
    leaf = torch.nn.Parameter(weight)
    leaf.grad_dtype = F32
    linear_cross_entropy(h, leaf, labels).backward()
    exact = run(linear_cross_entropy, [h.double(), weight.double()], (labels,), douts=[torch.ones(())])[1][1]
    assert (leaf.grad.double() - exact).abs().max() <= 2e-3 * exact.abs().max()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("dtype", (F32, F64))  # chunks, and the reference
def test_impossible_label_names_its_row(dtype):
    tensors, (labels,) = inputs(9, 16, 41, dtype, "cpu")
    labels[7] = 41
    with pytest.raises(RuntimeError, match=r"labels\[7\] is 41, takes an id below the vocabulary's 41"):
        linear_cross_entropy(*tensors, labels, chunk_tokens=4)


H, W, Y = torch.zeros(4, 8), torch.zeros(7, 8), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((H.int(), W, Y), {}, TypeError, "h: got torch.int32"),
        ((H[0, 0], W, Y), {}, ValueError, r"h: got shape \(\), takes"),
        ((H, W.bfloat16(), Y), {}, TypeError, "weight: got torch.bfloat16, takes h's torch.float32"),
        ((H, W.t(), Y), {}, ValueError, r"weight: got shape \(8, 7\), takes \(vocab, 8\)"),
        ((H, W[:0], Y), {}, ValueError, r"weight: got shape \(0, 8\)"),
        ((H, W.to("meta"), Y), {}, ValueError, "weight: got a tensor on meta"),
        ((H, W, Y[:3]), {}, ValueError, r"labels: got shape \(3,\), takes \(4,\)"),
        ((H, W, Y.float()), {}, TypeError, "labels: got torch.float32"),
        ((H, W, Y), {"weights": Y}, TypeError, "weights: got torch.int64"),
        ((H, W, Y), {"reduction": "all"}, ValueError, "reduction: got 'all', takes one of none, mean, sum"),
        ((H, W, Y), {"softcap": -1}, ValueError, "softcap: got -1"),
        (
            (H, W, Y),
            {"chunk_tokens": 0},
            ValueError,
            "chunk_tokens: got 0, takes a whole number of at least 1",
        ),
        ((H, W, Y), {"chunk_tokens": 2.5}, ValueError, "chunk_tokens: got 2.5"),
        ((H, W, Y), {"backend": "torch"}, ValueError, "has no torch kernel"),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(*arguments, **options)


@pytest.mark.gpu
def test_extra_memory_of_7b():
    """Beyond dh and dW (fp32), 8,192 tokens x 4,096 x 100,000 in bf16 take less than 1 GiB."""
    tokens, hidden, vocab = 8192, 4096, 100_000
    h = torch.randn(tokens, hidden, device="cuda", dtype=BF16).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(vocab, hidden, device="cuda", dtype=BF16) * hidden**-0.5)
    weight.grad_dtype = F32
    labels = labels_for(tokens, vocab, "cuda", 0)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(h, weight, labels).backward()
    gradients = h.grad.nbytes + weight.grad.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients < 2**30
    assert torch.equal(weight.grad.isfinite().all(), torch.tensor(True, device="cuda"))


def test_equals_cross_entropy_of_the_logits(device):
    tensors, (labels,) = inputs(33, 16, 123, F32, device)
    options = {"z_loss": 1e-3, "softcap": 9.0, "ignore_index": 5}
    labels = labels.clamp(min=0)
    ours = run(lambda *a: linear_cross_entropy(*a, chunk_tokens=8, **options), tensors, (labels,))
    theirs = run(lambda h, w, y: cross_entropy(F.linear(h, w), y, **options), tensors, (labels,))
    all_near(ours[0] + ours[1], theirs[0] + theirs[1], 8)


@pytest.mark.parametrize("grad_dtype", (F32, None), ids=("fp32", "own"))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_accumulate_adds_to_the_gradient_itself(device, dtype, grad_dtype):
    """What autograd would add, rounded once a call at most, in several chunks; nothing where there is no gradient."""
    (h, w), (labels, *_) = inputs(40, 64, 300, dtype, device)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(0)).to(device)
    options = {"weights": weights, "reduction": "sum", "chunk_tokens": 16}
    h = h.requires_grad_()
    weight, plain = (torch.nn.Parameter(w.clone()) for _ in range(2))
    for p in (weight, plain):
        p.grad_dtype = grad_dtype or dtype
    with torch.no_grad():
        linear_cross_entropy(h, weight, labels, accumulate=True, **options)
    assert weight.grad is None
    dhs = []
    for p, accumulate in ((plain, False), (weight, True)):
        for _ in range(3):
            loss = linear_cross_entropy(h, p, labels, accumulate=accumulate, **options)
            loss.backward()
        dhs.append(h.grad)
        h.grad = None
    eps = torch.finfo(dtype).eps  # on a GPU the third product of a shape may be another kernel's
    torch.testing.assert_close(*dhs, rtol=4 * eps, atol=float(4 * eps * dhs[0].abs().max()))
    assert weight.grad.dtype == (grad_dtype or dtype)
    eps = torch.finfo(weight.grad.dtype).eps
    torch.testing.assert_close(
        weight.grad, plain.grad, rtol=4 * eps, atol=float(4 * eps * plain.grad.abs().max())
    )


def test_a_scaled_loss_is_refused_with_accumulate():
    (h, w), (labels, *_) = inputs(4, 8, 30, F32, "cpu")
    loss = linear_cross_entropy(h, torch.nn.Parameter(w), labels, accumulate=True)
    with pytest.raises(RuntimeError, match="got a scaled loss, takes the scale as weights"):
        (2 * loss).backward()
