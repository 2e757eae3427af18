"""Cross-entropy of logits against labels.

    loss = logsumexp(logits) - logits[label]
    dlogits = (softmax(logits) - onehot(label)) * dloss

Forward keeps two fp32 numbers a row beside the logits, whose sum is the logsumexp (one number would lose the small part
where logits are large); PyTorch keeps the log-softmax, a second tensor of the logits' size. All arithmetic is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import backend as backends
from . import checks, library

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace_backward: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy in nats.

    Args:
        logits: (..., vocab), fp32, bf16, fp16 or fp64.
        labels: (...), int64 or int32: ids below vocab, or ignore_index.
        ignore_index: rows with this label give loss 0 and gradient 0, and don't count in the mean.
        reduction: `none`: a loss for each row; `sum`; `mean`: the sum over the number of rows that count (0 where
            none does, as an empty batch has no error to learn from; PyTorch gives NaN).
        inplace_backward: backward may write the gradient over the logits, for logits that nothing else reads: no second
            tensor of their size. Not done to a
            leaf or a view of one, to rows that overlap, by the reference and in compiled graphs.
        backend: `cpu`, `reference`; None chooses.

    Returns:
        The loss in fp32 (fp64 for fp64 logits): labels' shape for `none`, else a scalar.

    Saves the logits and their logsumexp for backward.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or reduction. RuntimeError, naming the row: a label beyond
        the vocabulary (on the CPU; a GPU stops with a device assert).
    """
    _check(logits, labels, ignore_index, reduction)
    chosen = backends.choose("cross_entropy", logits, backend)
    if chosen == "reference":
        _check_labels(labels, logits.shape[-1], ignore_index)
        losses = cross_entropy_reference(logits, labels, ignore_index)
    else:
        inplace = inplace_backward and not torch.compiler.is_compiling() and not _is_parameter(logits)
        losses = _CrossEntropy.apply(logits, labels, ignore_index, inplace, chosen)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (labels != ignore_index).sum().clamp(min=1)


def _is_parameter(t: torch.Tensor) -> bool:
    """Whether `t` is a leaf or a view of one, whose values a gradient must not replace."""
    return (t if t._base is None else t._base).is_leaf


def _check(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str) -> None:
    checks.is_float("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, takes (..., vocab) with vocab of at least 1"
        )
    checks.is_integer("labels", labels)
    checks.has_shape("labels", labels, logits.shape[:-1], "logits' shape without the vocabulary")
    checks.same_device("labels", labels, logits.device, "logits")
    if not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index: got {ignore_index!r}, takes a whole number")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, takes one of {', '.join(REDUCTIONS)}")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, inplace: bool, backend: str
    ) -> torch.Tensor:
        flat = checks.rows(logits, logits.shape[-1])
        flat_labels = labels.reshape(-1).to(torch.int64).contiguous()
        loss, lse = library.ops(backend).cross_entropy_fwd(flat, flat_labels, ignore_index, 0.0, 0.0)
        ctx.backend = backend
        ctx.save_for_backward(flat, flat_labels, lse)
        ctx.ignore_index, ctx.shape = ignore_index, logits.shape
        overlapping = len(flat) > 1 and flat.stride(0) < flat.shape[1]
        ctx.inplace = inplace and not overlapping
        return loss.view(labels.shape)

    @staticmethod
    @once_differentiable  # a second derivative raises instead of being wrong
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, labels, lse = ctx.saved_tensors
        dloss, ops = dloss.reshape(-1).contiguous(), library.ops(ctx.backend)
        if ctx.inplace:
            ops.cross_entropy_bwd_(dloss, flat, labels, lse, ctx.ignore_index, 0.0, 0.0)
            # a second backward must fail, not read the gradient as logits
            torch.autograd.graph.increment_version(flat)
            dlogits = flat
        else:
            dlogits = ops.cross_entropy_bwd(dloss, flat, labels, lse, ctx.ignore_index, 0.0, 0.0)
        return dlogits.view(ctx.shape), None, None, None, None


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


def _check_labels(labels: torch.Tensor, vocab: int, ignore_index: int) -> None:
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


def cross_entropy_reference(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100
) -> torch.Tensor:
    """The definition, a loss for each row, in fp32 (fp64 for fp64 logits).

    PyTorch's gradient of an ignored row is 0 * softmax: NaN where its logits are not finite. The kernels write 0.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat, flat_labels = wide.reshape(-1, wide.shape[-1]), labels.reshape(-1).long()
    loss = torch.nn.functional.cross_entropy(flat, flat_labels, ignore_index=ignore_index, reduction="none")
    return loss.view(labels.shape)
