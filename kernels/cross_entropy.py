"""Cross-entropy of logits against labels.

    l = softcap tanh(logits / softcap), or the logits themselves
    s = logsumexp(l)
    loss = s - l[label] + z_loss s^2
    dlogits = ((1 + 2 z_loss s) softmax(l) - onehot(label)) (1 - (l / softcap)^2) dloss

z_loss keeps s near 0 (Chowdhery et al., "PaLM", 2022), softcap keeps logits within it (Gemma 2, 2024). Forward keeps two
fp32 numbers a row beside the logits, whose sum is s (one number would lose the small part where logits are large); PyTorch
keeps the log-softmax, a second tensor of the logits' size. Or, in place, forward already writes the gradient over the
logits: one read, one write of them in all. All arithmetic is fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import backend as backends
from . import checks, library
from .scale import scale_

REDUCTIONS = ("none", "mean", "sum")


class Options(NamedTuple):
    """What the raw ops take beside their tensors."""

    ignore_index: int = -100
    softcap: float = 0.0
    z_loss: float = 0.0


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float = 0.0,
    inplace: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy in nats.

    Args:
        logits: (..., vocab), fp32, bf16, fp16 or fp64.
        labels: (...), int64 or int32: ids below vocab, or ignore_index.
        weights: labels' shape, fp32: each row's loss is multiplied by its weight. They get no gradient.
        ignore_index: rows with this label give loss 0 and gradient 0, and don't count in the mean.
        reduction: `none`: a loss for each row; `sum`; `mean`: the sum over the number of rows that count, or over the sum
            of their weights (0 where no row counts, as an empty batch has no error to learn from; PyTorch gives NaN).
        z_loss: at least 0; adds z_loss logsumexp^2 to the loss of each row that counts.
        softcap: above 0: softcap tanh(logits / softcap) takes the place of the logits; 0: no cap.
        inplace: the logits are nobody else's, and their gradient may take their place: no second tensor of their size.
            Where they need a gradient, `sum` and `mean` of fp32 and bf16 write it in forward, in one pass; `none` and
            fp16 (whose range 1 / rows would leave) in backward. It is not done to a leaf or a view of one, to rows that
            overlap, by the reference and in compiled graphs.
        backend: `cuda`, `triton`, `cpu`, `reference`; None chooses.

    Returns:
        The loss in fp32 (fp64 for fp64 logits): labels' shape for `none`, else a scalar.

    Saves the logits and their logsumexp for backward, or their gradient in their place.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, number or reduction. RuntimeError, naming the row: a label
        beyond the vocabulary (on the CPU; a GPU stops with a device assert).
    """
    _check(logits, labels)
    check_options(labels, weights, ignore_index, reduction, z_loss, softcap)
    options = Options(ignore_index, softcap, z_loss)
    weights = row_weights(labels, weights, ignore_index)
    count = weight_sum(labels, weights, ignore_index) if reduction == "mean" else None
    chosen = backends.choose("cross_entropy", logits, backend)
    if chosen == "reference":
        check_labels(labels, logits.shape[-1], ignore_index)
        losses = cross_entropy_reference(logits, labels, *options)
    else:
        inplace = inplace and _may_write_over(logits)
        if inplace and reduction != "none" and logits.dtype != torch.float16:
            return _CrossEntropyInPlace.apply(logits, labels, weights, count, options, chosen)
        losses = _CrossEntropy.apply(logits, labels, options, inplace, chosen)
    losses = losses if weights is None else losses * weights
    return losses if reduction == "none" else total(losses, count)


def _may_write_over(logits: torch.Tensor) -> bool:
    """Whether a gradient is asked for, and may take the place of values that nobody keeps."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return False
    return not (logits if logits._base is None else logits._base).is_leaf


# ---------------------------------------------------------------- shared with linear_cross_entropy


def check_options(
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    softcap: float,
) -> None:
    if weights is not None:
        checks.has_shape("weights", weights, labels.shape, "labels' shape")
        checks.same_dtype("weights", weights, torch.float32, "weights")
        checks.same_device("weights", weights, labels.device, "labels")
    if not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index: got {ignore_index!r}, takes a whole number")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, takes one of {', '.join(REDUCTIONS)}")
    checks.in_range("z_loss", z_loss, 0, 3e38, "a finite number of at least 0")
    checks.in_range("softcap", softcap, 0, 1e37, "a number above 0 and at most 1e37, or 0 for none")


def check_labels(labels: torch.Tensor, vocab: int, ignore_index: int) -> None:
    """On the CPU only, as the values of a GPU tensor would have to be waited for; the kernel checks by itself."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    flat = labels.reshape(-1)
    outside = ((flat < 0) | (flat >= vocab)) & (flat != ignore_index)
    if outside.any():
        i = int(outside.nonzero()[0])
        raise RuntimeError(
            f"cross_entropy: labels[{i}] is {flat[i]}, takes an id below the vocabulary's {vocab} or ignore_index"
        )


def row_weights(labels: torch.Tensor, weights: torch.Tensor | None, ignore_index: int) -> torch.Tensor | None:
    """Constants, and 0 where the label is ignored, whatever weight lies there."""
    return None if weights is None else weights.detach().masked_fill(labels == ignore_index, 0).contiguous()


def weight_sum(labels: torch.Tensor, weights: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """What a mean divides by: the sum of the weights of the rows that count, or their number; 1 where that is 0."""
    count = ((labels != ignore_index) if weights is None else weights.double()).sum()
    return count + (count == 0)


def total(losses: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
    return losses.sum() if count is None else losses.sum() / count.to(losses.dtype)


def _check(logits: torch.Tensor, labels: torch.Tensor) -> None:
    checks.is_float("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, takes (..., vocab) with vocab of at least 1"
        )
    checks.is_integer("labels", labels)
    checks.has_shape("labels", labels, logits.shape[:-1], "logits' shape without the vocabulary")
    checks.same_device("labels", labels, logits.device, "logits")


# ---------------------------------------------------------------- registration


def _flat(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, vocab) and (rows), as the raw ops take them. Detached, as autograd saves no view of what is written to."""
    flat = checks.rows(logits.detach(), logits.shape[-1])
    return flat, labels.reshape(-1).to(torch.int64).contiguous()


def _overlap(flat: torch.Tensor) -> bool:
    return len(flat) > 1 and flat.stride(0) < flat.shape[1]


class _CrossEntropy(torch.autograd.Function):
    """A loss for each row."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, options: Options, inplace: bool, backend: str
    ) -> torch.Tensor:
        flat, flat_labels = _flat(logits, labels)
        loss, lse = library.ops(backend).cross_entropy_fwd(flat, flat_labels, *options)
        ctx.save_for_backward(flat, flat_labels, lse)
        ctx.options, ctx.backend, ctx.shape = options, backend, logits.shape
        ctx.inplace = inplace and not _overlap(flat)
        return loss.view(labels.shape)

    @staticmethod
    @once_differentiable  # a second derivative raises instead of being wrong
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, labels, lse = ctx.saved_tensors
        dloss, ops = dloss.reshape(-1).contiguous(), library.ops(ctx.backend)
        if ctx.inplace:
            ops.cross_entropy_bwd_(dloss, flat, labels, lse, *ctx.options)
            # a second backward must fail, not read the gradient as logits
            torch.autograd.graph.increment_version(flat)
            dlogits = flat
        else:
            dlogits = ops.cross_entropy_bwd(dloss, flat, labels, lse, *ctx.options)
        return dlogits.view(ctx.shape), None, None, None, None


class _CrossEntropyInPlace(torch.autograd.Function):
    """The loss of all rows together. Forward turns the logits into its gradient, which backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor | None,
        count: torch.Tensor | None,
        options: Options,
        backend: str,
    ) -> torch.Tensor:
        flat, flat_labels = _flat(logits, labels)
        if _overlap(flat):
            flat = flat.clone(memory_format=torch.contiguous_format)
        dloss = None if weights is None else weights.reshape(-1)
        if count is not None:
            each = 1 / count.float()
            dloss = each.expand(len(flat)).contiguous() if dloss is None else dloss * each
        losses = library.ops(backend).cross_entropy_fwd_bwd_(flat, flat_labels, dloss, *options)
        torch.autograd.graph.increment_version(flat)  # for whoever has kept the logits
        ctx.save_for_backward(flat)
        ctx.shape = logits.shape
        return total(losses if weights is None else losses * weights.reshape(-1), count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        scale_(flat, dloss)
        return flat.view(ctx.shape), None, None, None, None, None


@library.fake("cross_entropy_fwd")
def _(
    logits: torch.Tensor, labels, ignore_index: int, softcap: float, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = logits.shape[0]
    return logits.new_empty((rows,), dtype=torch.float32), logits.new_empty((rows, 2), dtype=torch.float32)


@library.fake("cross_entropy_bwd")
def _(
    dloss, logits: torch.Tensor, labels, lse, ignore_index: int, softcap: float, z_loss: float
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


@library.fake("cross_entropy_bwd_")
def _(dloss, logits: torch.Tensor, labels, lse, ignore_index: int, softcap: float, z_loss: float) -> None:
    return None


@library.fake("cross_entropy_fwd_bwd_")
def _(logits: torch.Tensor, labels, dloss, ignore_index: int, softcap: float, z_loss: float) -> torch.Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


def cross_entropy_reference(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = -100,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The definition, a loss for each row, in fp32 (fp64 for fp64 logits).

    PyTorch's gradient of an ignored row is 0 * softmax: NaN where its logits are not finite. The kernels write 0.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat, flat_labels = wide.reshape(-1, wide.shape[-1]), labels.reshape(-1).long()
    if softcap:
        flat = softcap * torch.tanh(flat / softcap)
    loss = torch.nn.functional.cross_entropy(flat, flat_labels, ignore_index=ignore_index, reduction="none")
    if z_loss:
        square = flat.logsumexp(-1).square()
        loss = loss + z_loss * square.masked_fill(flat_labels == ignore_index, 0)
    return loss.view(labels.shape)
