"""cross_entropy: losses, gradients, ignored and impossible labels."""

import pytest
import torch
import torch.nn.functional as F

from openllama.ops import cross_entropy

from .contract import BF16, F32, F64, Contract
from .rule import all_near, assert_error_rule, near, random, run


def labels_for(rows, vocab, device, seed, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab, (rows,), generator=generator)
    return labels.masked_fill(torch.rand(rows, generator=generator) < ignored, -100).to(device)


class TestCrossEntropy(Contract):
    sizes = (41, 1, 7, 123, 4096)  # vocabulary
    reduction = "none"

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
        if device == "cuda" or dtype not in (F32, BF16):
            pytest.skip("the raw op has no such kernel")
        logits, labels = random((5, 40), dtype, device, 0)[:, 3:20], labels_for(5, 17, device, 0)
        loss, lse = torch.ops.openllama.cross_entropy_fwd(logits, labels, -100, 0.0, 0.0)
        ops = torch.ops.openllama
        return [
            (ops.cross_entropy_fwd.default, (logits, labels, -100, 0.0, 0.0)),
            (ops.cross_entropy_bwd.default, (torch.ones_like(loss), logits, labels, lse, -100, 0.0, 0.0)),
            (
                ops.cross_entropy_bwd_.default,
                (torch.ones_like(loss), logits.clone(), labels, lse, -100, 0.0, 0.0),
            ),
        ]


class TestCrossEntropySum(TestCrossEntropy):
    sizes = (50_257, 100_000, 128_256)
    dtypes = (F32, BF16)
    reduction = "sum"
    fuzz_cases = 50

    def make(self, rows, size, dtype, device, seed=0):
        return super().make(min(rows, 5), size, dtype, device, seed)

    test_layout_of_output_gradients = None  # the output is a scalar


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_mean_counts_what_is_not_ignored(device, dtype):
    logits, labels = random((20, 41), dtype, device, 0), labels_for(20, 41, device, 0, ignored=0.5)
    assert 0 < (labels == -100).sum() < 20
    assert_error_rule(cross_entropy, lambda x, y: F.cross_entropy(x.double() if x.dtype == F64 else x.float(), y),
                      [logits], (labels,))  # fmt: skip


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("backend", (None, "reference"))
def test_all_labels_ignored(device, reduction, backend):
    logits, labels = random((6, 41), F32, device, 0), torch.full((6,), -100, device=device)
    (loss,), (grad,) = run(cross_entropy, [logits], (labels,), reduction=reduction, backend=backend)
    assert loss.count_nonzero() == 0 and grad.count_nonzero() == 0 and grad.shape == logits.shape


def test_an_ignored_row_may_hold_anything():
    """On the kernels; the reference's gradient there is PyTorch's."""
    logits, labels = random((4, 41), F32, "cpu", 0), torch.tensor([3, -100, 0, 40])
    clean = run(cross_entropy, [logits.clone()], (labels,), backend="cpu")
    logits[1] = float("nan")
    dirty = run(cross_entropy, [logits], (labels,), backend="cpu")
    assert torch.equal(clean[0][0], dirty[0][0]) and torch.equal(clean[1][0], dirty[1][0])


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


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("column", (0, 5, 70, 99))
def test_nan_and_infinity_propagate(device, value, column):
    logits, labels = random((3, 100), F32, device, 0), torch.tensor([1, 2, 3], device=device)
    logits[1, column] = value
    (loss,), (grad,) = run(cross_entropy, [logits], (labels,), reduction="none", douts=[torch.ones(3)])
    assert not loss[1].isfinite() and loss[::2].isfinite().all()
    assert not grad[1].isfinite().all() and grad[::2].isfinite().all()


def test_masked_logits(device):
    """-inf takes a token out of the vocabulary, as in constrained decoding."""
    logits, labels = random((3, 100), F32, device, 0), torch.tensor([1, 2, 3], device=device)
    logits[:, 50:] = float("-inf")
    ours, theirs = (run(f, [logits], (labels,)) for f in (cross_entropy, F.cross_entropy))
    all_near(ours[0] + ours[1], theirs[0] + theirs[1], 4)


@pytest.mark.parametrize("top", (1e4, -1e4, 3e38))
def test_large_logits_do_not_overflow(device, top):
    logits, labels = random((3, 100), F32, device, 0) + top, torch.tensor([1, 2, 3], device=device)
    all_near(run(cross_entropy, [logits], (labels,))[1], run(F.cross_entropy, [logits], (labels,))[1], 4)


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


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_inplace_backward_writes_the_gradient_over_the_logits(dtype):
    logits, labels = random((9, 123), dtype, "cpu", 3), labels_for(9, 123, "cpu", 3)
    weight = torch.ones(123, dtype=dtype, requires_grad=True)
    expected = torch.autograd.grad(cross_entropy(logits * weight, labels), weight)[0]
    fresh = logits * weight
    loss = cross_entropy(fresh, labels, inplace_backward=True)
    assert torch.equal(torch.autograd.grad(loss, weight, retain_graph=True)[0], expected)
    softmax = (logits.float().softmax(-1) / (labels != -100).sum()).to(dtype)
    rest = torch.arange(123) != labels[:, None]
    near(fresh.detach()[rest & (labels != -100)[:, None]], softmax[rest & (labels != -100)[:, None]], 4)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


def test_inplace_backward_leaves_a_parameter_alone():
    leaf, labels = random((3, 7), F32, "cpu", 0).requires_grad_(), torch.tensor([1, 2, 3])
    before = leaf.detach().clone()
    for logits in (leaf, leaf[:, :5]):
        cross_entropy(logits, labels, inplace_backward=True).backward()
        assert torch.equal(leaf, before)


def test_inplace_backward_leaves_rows_that_overlap_alone():
    row, labels = random((1, 7), F32, "cpu", 0), torch.tensor([1, 2, 3])
    inplace, plain = (
        run(lambda x, inplace=inplace: cross_entropy((x * 1).expand(3, 7), labels, inplace_backward=inplace), [row])
        for inplace in (True, False)
    )  # fmt: skip
    assert torch.equal(inplace[1][0], plain[1][0])


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


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    rows, vocab = 17_000, 128_256  # 2.18e9 logits: 4.4 GB in bf16, 8.7 GB in fp32
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip("needs 45 GB of free GPU memory")
    logits, labels = (
        torch.zeros(rows, vocab, dtype=BF16, device="cuda"),
        labels_for(rows, vocab, "cuda", 0, ignored=0),
    )
    logits[-1] = random((vocab,), BF16, "cuda", 0)
    last = run(
        lambda x: cross_entropy(x, labels[-1:], reduction="none"), [logits[-1:]], douts=[torch.ones(1)]
    )
    losses, grads = run(
        lambda x: cross_entropy(x, labels, reduction="none"), [logits], douts=[torch.ones(rows)]
    )
    near(losses[0][-1:], last[0][0], 4)
    near(grads[0][-1:], last[1][0], 4)
