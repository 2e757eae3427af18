"""cross_entropy: losses, gradients, weights, impossible labels. test_cross_entropy_inplace.py holds what depends on the path."""

import math

import pytest
import torch
import torch.nn.functional as F

from openllama.ops import cross_entropy

from .contract import BF16, F16, F32, F64, Contract
from .rule import LAYOUTS, all_near, assert_error_rule, ends, laid_out, near, random, run


def labels_for(rows, vocab, device, seed, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab, (rows,), generator=generator)
    return labels.masked_fill(torch.rand(rows, generator=generator) < ignored, -100).to(device)


class TestCrossEntropy(Contract):
    sizes = (41, 1, 7, 123, 4096)  # vocabulary
    reduction = "none"
    numbers = (0.0, 0.0)  # softcap, z_loss
    terms = 4.0  # logits: a loss is what is left of two of them

    def make(self, rows, size, dtype, device, seed=0):
        return [random((rows, size), dtype, device, seed, scale=4)], (labels_for(rows, size, device, seed),)

    def op(self, logits, labels, backend=None):
        return cross_entropy(logits, labels, reduction=self.reduction, backend=backend)

    def eager(self, logits, labels):
        wide = logits if logits.dtype == F64 else logits.float()  # as transformers' loss does
        return F.cross_entropy(wide, labels, reduction=self.reduction)

    def floor(self, size):
        return 4.0 if size == 1 else 0.0  # loss is what two logits of that size leave

    def fuzz_size(self, rng):
        return rng.choice((2, 3, 15, 16, 17, 63, 64, 65, 127, 1000))

    def raw(self, device, dtype):
        if dtype == F64 or (device == "cpu" and dtype == F16):
            pytest.skip("the raw op has no such kernel")
        logits, labels = random((5, 40), dtype, device, 0)[:, 3:20], labels_for(5, 17, device, 0)
        ops, options = torch.ops.openllama, (-100, *self.numbers)
        loss, lse = ops.cross_entropy_fwd(logits, labels, *options)
        dloss = torch.ones_like(loss)
        return [
            (ops.cross_entropy_fwd.default, (logits, labels, *options)),
            (ops.cross_entropy_bwd.default, (dloss, logits, labels, lse, *options)),
            (ops.cross_entropy_bwd_.default, (dloss, logits.clone(), labels, lse, *options)),
            (ops.cross_entropy_fwd_bwd_.default, (logits.clone(), labels, None, *options)),
            (ops.cross_entropy_fwd_bwd_.default, (logits.clone(), labels, dloss, *options)),
        ]


class TestCrossEntropySum(TestCrossEntropy):
    sizes = (50_257, 100_003, 128_256)
    dtypes = (F32, BF16)
    reduction = "sum"
    fuzz_cases = 50

    def make(self, rows, size, dtype, device, seed=0):
        return super().make(min(rows, 5), size, dtype, device, seed)

    test_layout_of_output_gradients = None  # the output is a scalar


def definition(logits, labels, weights, softcap, z_loss, reduction):
    """In plain torch."""
    wide = logits if logits.dtype == F64 else logits.float()
    capped = softcap * torch.tanh(wide / softcap) if softcap else wide
    losses = F.cross_entropy(capped, labels, reduction="none")
    losses = losses + z_loss * capped.logsumexp(-1).square() * (labels != -100)
    if reduction == "none":
        return losses * weights
    count = weights.double()[labels != -100].sum()
    return (losses * weights).sum() / (1 if reduction == "sum" or count == 0 else count.to(losses.dtype))


class TestCrossEntropyOptions(TestCrossEntropy):
    """softcap, z_loss and weights."""

    sizes = (41, 7, 123, 4096)
    numbers = (10.0, 1e-2)
    fuzz_cases = 50

    def make(self, rows, size, dtype, device, seed=0):
        tensors, (labels,) = super().make(rows, size, dtype, device, seed)
        return tensors, (labels, random((rows,), F32, device, seed + 1).abs() + 0.1)

    def op(self, logits, labels, weights, backend=None):
        softcap, z_loss = self.numbers
        return cross_entropy(
            logits, labels, weights=weights, softcap=softcap, z_loss=z_loss, reduction=self.reduction,
            backend=backend,
        )  # fmt: skip

    def eager(self, logits, labels, weights):
        return definition(logits, labels, weights, *self.numbers, self.reduction)


class TestCrossEntropyInPlace(TestCrossEntropyOptions):
    """The gradient takes the place of a product's logits, in forward."""

    reduction = "mean"
    ulps = 3.0  # of one number: there is no average over errors of either sign

    def make(self, rows, size, dtype, device, seed=0):
        tensors, (labels, weights) = super().make(rows, size, dtype, device, seed)
        if rows:
            labels[0] = size - 1  # a row that counts
        return tensors, (labels, weights)

    def op(self, logits, labels, weights, backend=None):
        softcap, z_loss = self.numbers
        return cross_entropy(
            logits * 1, labels, weights=weights, softcap=softcap, z_loss=z_loss, reduction=self.reduction,
            inplace=True, backend=backend,
        )  # fmt: skip

    test_layout_of_output_gradients = None  # the output is a scalar
    test_opcheck = test_fake_has_the_real_strides = None  # TestCrossEntropyOptions checks the same raw ops


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_mean_counts_what_is_not_ignored(device, dtype):
    logits, labels = random((20, 41), dtype, device, 0), labels_for(20, 41, device, 0, ignored=0.5)
    assert 0 < (labels == -100).sum() < 20
    assert_error_rule(cross_entropy, lambda x, y: F.cross_entropy(x.double() if x.dtype == F64 else x.float(), y),
                      [logits], (labels,))  # fmt: skip


def test_weights_of_rows(device):
    """A weight of 0 takes a row out; what lies beside an ignored label counts for nothing; no gradient for weights."""
    logits = random((4, 41), F32, device, 0)
    labels = torch.tensor([3, -100, 0, 40], device=device)
    weights = torch.tensor([0.5, float("nan"), 0.0, 2.0], device=device, requires_grad=True)
    (loss,), (grad,) = run(lambda x: cross_entropy(x, labels, weights=weights), [logits])
    rows = F.cross_entropy(logits, labels, reduction="none")
    near(loss, (0.5 * rows[0] + 2 * rows[3]) / 2.5, 4)
    assert grad[0].any() and not grad[1:3].any() and grad[3].any() and weights.grad is None
    each = cross_entropy(logits, labels, weights=weights, reduction="none")
    near(each, torch.stack([0.5 * rows[0], 0 * rows[0], 0 * rows[0], 2 * rows[3]]), 4)


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("inplace", (False, True))
def test_weights_in_any_layout(device, reduction, inplace):
    logits, labels = random((12, 41), F32, device, 0), labels_for(12, 41, device, 0)
    weights = random((12,), F32, device, 1).abs()

    def loss(x, w):
        return cross_entropy(x * 1, labels.view(w.shape), weights=w, reduction=reduction, inplace=inplace)

    for layout in LAYOUTS:
        laid = laid_out(weights, layout)
        (dense,), (grad,) = run(loss, [logits], (laid.contiguous(),))
        ours = run(loss, [logits], (laid,))
        assert torch.equal(ours[0][0], dense) and torch.equal(ours[1][0], grad)
    wide = laid_out(weights.view(3, 4), "transposed")
    ours = run(loss, [logits.view(3, 4, 41)], (wide,))
    all_near([ours[0][0].reshape(dense.shape), ours[1][0].view(12, 41)], [dense, grad], 4)


def test_a_cap_far_above_the_logits_changes_nothing(device):
    """tanh of a small number keeps its digits."""
    logits, labels = random((9, 123), F32, device, 0, scale=4), labels_for(9, 123, device, 0)
    capped, plain = (run(cross_entropy, [logits], (labels,), softcap=softcap) for softcap in (1e6, 0.0))
    all_near(capped[0] + capped[1], plain[0] + plain[1], 16)


def test_z_loss_draws_the_logsumexp_to_0(device):
    logits, labels = torch.zeros(1, 41, device=device), torch.tensor([3], device=device)
    with_z, without = (run(cross_entropy, [logits], (labels,), z_loss=z)[0][0] for z in (0.5, 0.0))
    near(with_z - without, torch.tensor(0.5 * math.log(41) ** 2, device=device), 4)


def test_ignore_index_may_be_an_id(device):
    logits, labels = random((4, 41), F32, device, 0), torch.tensor([3, 0, 0, 40], device=device)
    ours = run(cross_entropy, [logits], (labels,), ignore_index=0)
    theirs = run(F.cross_entropy, [logits], (labels,), ignore_index=0)
    all_near(ours[0] + ours[1], theirs[0] + theirs[1], 4)


def test_int32_labels(device):
    logits, labels = random((4, 41), F32, device, 0), torch.tensor([3, -100, 0, 40], device=device)
    assert torch.equal(cross_entropy(logits, labels), cross_entropy(logits, labels.int()))


def test_nearly_certain_bf16_row_keeps_its_gradient(device):
    """softmax(target) = 0.999 rounds to 1 in bf16: the gradient is p - 1 of the unrounded p."""
    logits = torch.full((1, 1000), -4.0, dtype=BF16, device=device)
    logits[0, 7] = 9.8125
    (grad,) = run(cross_entropy, [logits], (torch.tensor([7], device=device),), douts=[torch.ones(())])[1]
    exact = logits.double().softmax(-1)[0, 7] - 1
    assert -0.002 < exact < -0.0005
    near(grad[0, 7], exact.to(BF16), 1)


@pytest.mark.parametrize("label", (41, -1, -101, 2**40))
def test_impossible_label_names_its_row(label):
    labels = torch.tensor([0, 1, label, 3])
    with pytest.raises(RuntimeError, match=rf"labels\[2\] is {label}, takes an id below the vocabulary's 41"):
        cross_entropy(random((4, 41), F32, "cpu", 0), labels)
    with pytest.raises(RuntimeError, match=rf"labels\[2\] is {label}, takes an id below the vocabulary's 41"):
        cross_entropy(random((4, 41), F64, "cpu", 0), labels)


def test_raw_backward_writes_nothing_for_an_impossible_label():
    logits, dloss = random((4, 41), F32, "cpu", 0), torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"labels\[1\] is 1000"):
        torch.ops.openllama.cross_entropy_bwd(
            dloss, logits, torch.tensor([0, 1000, 2, 3]), torch.zeros(4, 2), -100, 0.0, 0.0
        )


def test_any_leading_shape(device):
    logits, labels = random((30, 7), F32, device, 0), labels_for(30, 7, device, 0)
    flat = cross_entropy(logits, labels, reduction="none")
    assert torch.equal(
        cross_entropy(logits.view(2, 15, 7), labels.view(2, 15), reduction="none"), flat.view(2, 15)
    )
    assert torch.equal(cross_entropy(logits[3], labels[3], reduction="none"), flat[3])


X, Y = torch.zeros(4, 7), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X, Y[:3]), {}, ValueError, r"labels: got shape \(3,\), takes \(4,\)"),
        ((X, [0, 1]), {}, TypeError, "labels: got list, takes a tensor"),
        ((X, Y.float()), {}, TypeError, "labels: got torch.float32, takes int32 or int64"),
        ((X.int(), Y), {}, TypeError, "logits: got torch.int32"),
        ((X, Y), {"ignore_index": 1.5}, TypeError, "ignore_index: got 1.5, takes a whole number"),
        ((X[:, :0], Y), {}, ValueError, r"logits: got shape \(4, 0\)"),
        ((X, Y), {"weights": Y.float()[:3]}, ValueError, r"weights: got shape \(3,\), takes \(4,\)"),
        ((X, Y), {"weights": Y.double()}, TypeError, "weights: got torch.float64"),
        ((X, Y), {"weights": 0.5}, TypeError, "weights: got float, takes a tensor"),
        (
            (X, Y),
            {"softcap": -1.0},
            ValueError,
            "softcap: got -1.0, takes a number above 0 and at most 1e37, or 0 for none",
        ),
        ((X, Y), {"softcap": float("nan")}, ValueError, "softcap: got nan"),
        (
            (X, Y),
            {"z_loss": float("inf")},
            ValueError,
            "z_loss: got inf, takes a finite number of at least 0",
        ),
        (
            (X, Y),
            {"reduction": "average"},
            ValueError,
            "reduction: got 'average', takes one of none, mean, sum",
        ),
        ((X, Y.to("meta")), {}, ValueError, "labels: got a tensor on meta, takes logits's cpu"),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        cross_entropy(*arguments, **options)


# bf16 rows that the kernel holds in a block, in part, and by clusters of 4 and of 8; half as many elements in fp32.
@pytest.mark.gpu
@pytest.mark.parametrize("vocab", (8_191, 50_257, 151_936, 202_048, 300_001))
@pytest.mark.parametrize("dtype", (F32, BF16))
def test_long_rows_in_place(vocab, dtype):
    contract = TestCrossEntropyInPlace()
    contract.numbers = (0.0, 1e-2)  # with a softcap nothing is held
    tensors, constants = contract.make(9, vocab, dtype, "cuda")
    assert_error_rule(contract.op, contract.eager, tensors, constants, ulps=contract.ulps)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("cuda", "triton"))
@pytest.mark.parametrize("inplace", (False, True))
def test_more_than_2_to_the_31_elements(backend, inplace):
    rows, vocab = 17_000, 128_256  # 2.18e9 logits: 4.4 GB in bf16
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip("needs 45 GB of free GPU memory")
    reduction = "sum" if inplace else "none"  # a sum's gradient is written in forward
    logits = torch.zeros(rows, vocab, dtype=BF16, device="cuda")
    labels = labels_for(rows, vocab, "cuda", 0, ignored=0)
    logits[0], logits[-1] = random((2, vocab), BF16, "cuda", 0)

    def losses_and_gradient(logits, labels):
        def op(x):
            return cross_entropy(x * 1, labels, reduction=reduction, inplace=inplace, backend=backend)

        dloss = torch.ones(() if inplace else len(labels))
        (losses,), (grad,) = run(op, [logits], douts=[dloss])
        return losses, grad

    losses, grad = losses_and_gradient(logits, labels)
    alone, alone_grad = losses_and_gradient(ends(logits), ends(labels))
    near(ends(grad), alone_grad, 4)
    if not inplace:
        near(ends(losses), alone, 4)
