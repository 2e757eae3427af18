"""cross_entropy's ways to its gradient: a tensor of its own, over the logits in forward, over them in backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from openllama.ops import cross_entropy

from .contract import BF16, F16, F32
from .rule import all_near, near, random, run
from .test_cross_entropy import labels_for

REDUCTIONS = ("none", "mean", "sum")


@pytest.fixture(params=("out of place", "in place", "reference"))
def path(request):
    """cross_entropy of a product's logits, by each way there is."""
    if request.param == "reference":
        return lambda x, y, **options: cross_entropy(x, y, backend="reference", **options)
    return lambda x, y, **options: cross_entropy(x * 1, y, inplace=request.param == "in place", **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", (False, True))
def test_all_labels_ignored(device, path, reduction, weighted):
    logits, labels = random((6, 41), F32, device, 0), torch.full((6,), -100, device=device)
    weights = torch.ones(6, device=device) if weighted else None
    (loss,), (grad,) = run(path, [logits], (labels,), reduction=reduction, weights=weights)
    assert loss.count_nonzero() == 0 and grad.count_nonzero() == 0 and grad.shape == logits.shape


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_ignored_row_may_hold_anything(device, inplace, reduction):
    """On the kernels; the reference's gradient there is PyTorch's."""

    def loss(x, y):
        return cross_entropy(x * 1, y, inplace=inplace, reduction=reduction, z_loss=1e-3)

    logits, labels = random((4, 41), F32, device, 0), torch.tensor([3, -100, 0, 40], device=device)
    clean = run(loss, [logits.clone()], (labels,))
    for value in (float("nan"), float("inf"), float("-inf")):
        logits[1] = value
        dirty = run(loss, [logits], (labels,))
        assert torch.equal(clean[0][0], dirty[0][0]) and torch.equal(clean[1][0], dirty[1][0])


@pytest.mark.parametrize("softcap", (0.0, 30.0))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("column", (0, 5, 70, 99))
def test_nan_and_infinity_propagate(device, path, value, column, softcap):
    """Of a row, to that row alone; a cap makes infinity finite."""
    if softcap and value == float("inf"):
        pytest.skip("the cap takes it")
    logits, labels = random((3, 100), F32, device, 0), torch.tensor([1, 2, 3], device=device)
    logits[1, column] = value
    losses = path(logits, labels, reduction="none", softcap=softcap)
    assert not losses[1].isfinite() and losses[::2].isfinite().all()
    (total,), (grad,) = run(path, [logits], (labels,), reduction="sum", softcap=softcap)
    assert not total.isfinite() and not grad[1].isfinite().all() and grad[::2].isfinite().all()


def test_masked_logits(device, path):
    """-inf takes a token out of the vocabulary, as in constrained decoding."""
    logits, labels = random((3, 100), F32, device, 0), torch.tensor([1, 2, 3], device=device)
    logits[:, 50:] = float("-inf")
    ours, theirs = (run(f, [logits], (labels,)) for f in (path, F.cross_entropy))
    all_near(ours[0] + ours[1], theirs[0] + theirs[1], 4)


@pytest.mark.parametrize("top", (1e4, -1e4, 3e38))
def test_large_logits_do_not_overflow(device, path, top):
    logits, labels = random((3, 100), F32, device, 0) + top, torch.tensor([1, 2, 3], device=device)
    all_near(run(path, [logits], (labels,))[1], run(F.cross_entropy, [logits], (labels,))[1], 4)


# ---------------------------------------------------------------- over the logits


def product(dtype, device, rows=9):
    """(logits that are a product, the weight they come from, labels)."""
    labels = labels_for(rows, 123, device, 3)
    weight = torch.ones(123, dtype=dtype, device=device, requires_grad=True)
    return random((rows, 123), dtype, device, 3) * weight, weight, labels


@pytest.mark.parametrize("dtype", (F32, BF16, F16))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradient_takes_the_logits_place(device, dtype, reduction):
    if device == "cpu" and dtype == F16:
        pytest.skip("fp16 runs on the reference here")
    logits, weight, labels = product(dtype, device)
    options = {"reduction": reduction, "weights": torch.rand(9, device=device) + 0.5}
    plain = cross_entropy(logits, labels, **options)
    (dlogits, expected) = torch.autograd.grad(plain.sum(), (logits, weight))
    fresh, weight, _ = product(dtype, device)
    before = fresh.detach().clone()
    loss = cross_entropy(fresh, labels, inplace=True, **options)
    near(loss, plain, 4)
    at_once = reduction != "none" and dtype != F16
    assert torch.equal(fresh.detach(), before) != at_once
    (grad,) = torch.autograd.grad(loss.sum(), weight, retain_graph=True)
    near(grad, expected, 2)
    near(fresh.detach(), dlogits, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("factor", (1.0, 1 / 3, -1e-4, float("nan")))
def test_what_arrives_at_the_loss_scales_the_gradient(device, dtype, factor):
    """In fp32, rounded once: the factor itself is not rounded to bf16."""
    logits, weight, labels = product(dtype, device)
    loss = cross_entropy(logits, labels, reduction="sum", inplace=True)
    written = logits.detach().clone()
    (loss * factor).backward()
    expected = (written.float() * torch.tensor(factor, dtype=F32, device=device)).to(dtype)
    assert torch.equal(logits.detach().nan_to_num(7), expected.nan_to_num(7)) and weight.grad is not None


def test_whoever_kept_the_logits_is_told(device):
    logits, _, labels = product(F32, device)
    other = logits.square().sum()
    cross_entropy(logits, labels, reduction="sum", inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logits_stay_where_no_gradient_is_asked_for(device, reduction):
    logits, _, labels = product(F32, device)
    before = logits.detach().clone()
    with torch.no_grad():
        cross_entropy(logits, labels, inplace=True, reduction=reduction)
    constant = logits.detach()
    assert not cross_entropy(constant, labels, inplace=True, reduction=reduction).requires_grad
    assert torch.equal(logits, before) and torch.equal(constant, before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_parameter_is_left_alone(device, reduction):
    leaf, labels = (
        random((3, 7), F32, device, 0).requires_grad_(),
        torch.tensor([1, 2, 3], device=device),
    )
    before = leaf.detach().clone()
    for logits in (leaf, leaf[:, :5], leaf[:, None, :]):
        shaped = labels.view(logits.shape[:-1])
        cross_entropy(logits, shaped, inplace=True, reduction=reduction).sum().backward()
        assert torch.equal(leaf, before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_that_overlap_are_left_alone(device, reduction):
    row, labels = random((1, 7), F32, device, 0), torch.tensor([1, 2, 3], device=device)
    inplace, plain = (
        run(
            lambda x, inplace=inplace: cross_entropy(
                (x * 1).expand(3, 7), labels, inplace=inplace, reduction=reduction
            ),
            [row],
        )
        for inplace in (True, False)
    )
    all_near(inplace[0] + inplace[1], plain[0] + plain[1], 2)


def test_an_impossible_label_leaves_the_logits_alone():
    logits, _, labels = product(F32, "cpu")
    before, labels[5] = logits.detach().clone(), 123
    with pytest.raises(RuntimeError, match=r"labels\[5\] is 123"):
        cross_entropy(logits, labels, inplace=True, reduction="sum")
    assert torch.equal(logits, before)


@pytest.mark.parametrize("reentrant", (False, True))
def test_under_checkpoint(device, reentrant):
    """Backward makes the logits again; on a fresh product that changes nothing."""
    x, weight, labels = (
        random((9, 32), F32, device, 2),
        random((41, 32), F32, device, 1),
        labels_for(9, 41, device, 3),
    )

    def loss(x, weight):
        return cross_entropy(x @ weight.T, labels, inplace=True)

    def gradients(function):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    again = gradients(lambda *leaves: checkpoint(loss, *leaves, use_reentrant=reentrant))
    assert all(torch.equal(a, p) for a, p in zip(again, gradients(loss)))
