"""Cross-entropy of a linear layer's logits, h W^T, which are never there all at once.

    logits = h W^T,   loss and its gradient G over the logits as in cross_entropy
    dh = G W,   dW = G^T h

The tokens are taken in a few equal chunks, large ones, as that is what matrix products are fast at. A chunk's logits are
made in one buffer that all chunks share, turned into their gradient in place (one read, one write), and multiplied into dh
and dW on the spot: nothing is computed twice, and the memory beyond the two gradients is that of one chunk. Liger (Hsu
et al., "Liger Kernel", 2024) does so too. dW is summed in fp32 over all chunks and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import backend as backends
from . import checks, library
from .cross_entropy import (
    Options,
    check_labels,
    check_options,
    cross_entropy_reference,
    row_weights,
    total,
    weight_sum,
)
from .matmul import accumulates, give_gradient, grad_dtype, matmul, new_gradient
from .scale import scale_

_CHUNK_BYTES = int(0.8 * 2**30)  # of logits
_TILE = 128  # rows of a matrix product's tile: chunks are multiples of it
# On the CPU. Of 4,096 tokens x 4,096 fp32 logits, a step takes 75 ms of two cores, and 90 ms with all at once.
_CPU_TOKENS = 1024


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk_tokens: int | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """cross_entropy(h @ weight.T, labels), in nats, without the logits of more than one chunk of tokens.

    Args:
        h: (..., hidden), fp32, bf16, fp16 or fp64.
        weight: (vocab, hidden), h's dtype.
        labels: (...), int64 or int32: ids below vocab, or ignore_index.
        weights, ignore_index, reduction, z_loss, softcap: as in `cross_entropy`. With `none`, backward makes the logits
            again, since only then the gradient of each row is known.
        chunk_tokens: tokens in a chunk; None: equal chunks of at most 0.8 GiB of logits (CPU: 1,024 tokens too).
        accumulate: forward adds dW to `weight.grad` itself, in the matrix product, and backward gives autograd none. The
            loss has to be the root of backward then: a gradient of it other than 1 raises (on a GPU as a device assert).
            What scales it goes into `weights`. Not for `none`, the reference, or where no gradient is asked for.
        backend: of the cross-entropy, `cuda`, `triton`, `cpu`, `reference`; None chooses. The reference holds all logits,
            and is what fp64 runs on everywhere and fp16 on the CPU.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs): labels' shape for `none`, else a scalar.

    Saves for backward dh (h's dtype) and dW (fp32), which backward only scales, of those that are asked for; with `none`, h
    and weight. dW comes in fp32 where `weight.grad_dtype` is that, else rounded once to weight's dtype.

    The gradients that forward made are used up by the first backward: a second one raises (but for `none`). On a GPU the
    first calls of a shape may differ from later ones in their last bits: see `matmul`'s `tune`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, number or reduction. RuntimeError, naming the row: a label
        beyond the vocabulary (on the CPU; a GPU stops with a device assert).
    """
    _check(h, weight, labels, chunk_tokens)
    check_options(labels, weights, ignore_index, reduction, z_loss, softcap)
    options = Options(ignore_index, softcap, z_loss)
    weights = row_weights(labels, weights, ignore_index)
    count = weight_sum(labels, weights, ignore_index) if reduction == "mean" else None
    chosen = backends.choose("linear_cross_entropy", h, backend)
    if accumulate and reduction == "mean" and h.dtype == torch.float16:  # which is divided after the sum
        raise ValueError(
            "accumulate: got True for a mean in float16, takes reduction='sum' with weights there"
        )
    if chosen != "reference" and reduction != "none":
        accumulate = accumulates(weight, accumulate)
        return _summed(h, weight, labels, weights, count, (options, chunk_tokens, chosen), accumulate)
    if chosen == "reference":
        check_labels(labels, len(weight), ignore_index)
        losses = cross_entropy_reference(F.linear(h, weight), labels, *options)
    else:
        settings = (options, chunk_tokens, chosen)
        losses = _RowLosses.apply(*_flat(h, weight, labels), settings).view(labels.shape)
    losses = losses if weights is None else losses * weights
    return losses if reduction == "none" else total(losses, count)


def _flat(h, weight, labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return checks.rows(h, h.shape[-1]), weight, labels.reshape(-1).to(torch.int64).contiguous()


def _summed(h, weight, labels, weights, count, settings, accumulate: bool) -> torch.Tensor:
    """The weighted sum, over `count` for a mean."""
    weights = None if weights is None else weights.reshape(-1)
    if count is not None and h.dtype != torch.float16:
        # As weights of the rows, so that backward mostly has nothing to scale; fp16 would round them to 0.
        ones = h.new_ones((labels.numel(),), dtype=torch.float32)
        weights, count = (ones if weights is None else weights) / count.float(), None
    needs = tuple(torch.is_grad_enabled() and t.requires_grad for t in (h, weight))
    loss = _SummedLoss.apply(*_flat(h, weight, labels), weights, needs, accumulate and needs[1], settings)
    return total(loss, count)


def _check(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_tokens: int | None) -> None:
    checks.is_float("h", h)
    if h.dim() == 0 or h.shape[-1] == 0:
        raise ValueError(f"h: got shape {tuple(h.shape)}, takes (..., hidden) with hidden of at least 1")
    checks.same_dtype("weight", weight, h.dtype, "h")
    if weight.dim() != 2 or weight.shape[1] != h.shape[-1] or len(weight) == 0:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, takes (vocab, {h.shape[-1]}) (h's hidden) with vocab of at least 1"
        )
    checks.same_device("weight", weight, h.device, "h")
    checks.is_integer("labels", labels)
    checks.has_shape("labels", labels, h.shape[:-1], "h's shape without the hidden one")
    checks.same_device("labels", labels, h.device, "h")
    if chunk_tokens is not None and (not isinstance(chunk_tokens, (int, torch.SymInt)) or chunk_tokens < 1):
        raise ValueError(f"chunk_tokens: got {chunk_tokens!r}, takes a whole number of at least 1, or None")


def _chunk_tokens(tokens: int, vocab: int, itemsize: int, device_type: str) -> int:
    """Tokens in each of the fewest equal chunks whose logits take at most _CHUNK_BYTES."""
    most = max(1, _CHUNK_BYTES // (vocab * itemsize))
    if device_type == "cpu":
        most = min(most, _CPU_TOKENS)
    chunks = max(1, -(-tokens // most))
    equal = max(1, -(-tokens // chunks))
    return min(most, -(-equal // _TILE) * _TILE)


# ---------------------------------------------------------------- registration


@torch.library.custom_op("openllama::linear_cross_entropy", mutates_args=())
def _losses_and_gradients(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    dloss: torch.Tensor | None,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    chunk_tokens: int | None,
    need_dh: bool,
    need_dweight: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (tokens), and where they are needed dh (h's dtype) and dW (fp32) of the losses' sum with weights `dloss`.

    An op, so that torch.compile takes its loop for one node of the graph.
    """
    dh, dweight = _empty_gradients(h, weight, need_dh, need_dweight)
    options = (ignore_index, softcap, z_loss)
    losses = _run_chunks(h, weight, labels, dloss, options, chunk_tokens, dh, dweight, True, backend)
    return losses, dh, dweight


def _run_chunks(
    h, weight, labels, dloss, options, chunk_tokens, dh, dweight, first: bool, backend: str
) -> torch.Tensor:
    """The losses; writes dh and, where it is the first, dweight, else adds to it. An empty one is not needed."""
    check_labels(labels, len(weight), options[0])
    ops, needed = library.ops(backend), bool(dh.numel() or dweight.numel())
    losses = h.new_empty((len(h),), dtype=torch.float32)
    if len(h) == 0:
        if first:
            dweight.zero_()
        return losses
    chunk = min(len(h), chunk_tokens or _chunk_tokens(len(h), len(weight), h.element_size(), h.device.type))
    logits = h.new_empty((chunk, len(weight)))
    for begin in range(0, len(h), chunk):
        rows = slice(begin, begin + chunk)
        piece = logits[: len(h[rows])]
        matmul(h[rows], weight.t(), piece, tune=needed)
        if not needed:
            losses[rows] = ops.cross_entropy_fwd(piece, labels[rows], *options)[0]
            continue
        row_dloss = None if dloss is None else dloss[rows]
        losses[rows] = ops.cross_entropy_fwd_bwd_(piece, labels[rows], row_dloss, *options)
        if dh.numel():
            matmul(piece, weight, dh[rows])
        if dweight.numel():
            matmul(piece.t(), h[rows], dweight, accumulate=begin > 0 or not first)
    return losses


def _empty_gradients(h, weight, need_dh: bool, need_dweight: bool) -> tuple[torch.Tensor, torch.Tensor]:
    dh = h.new_empty(h.shape if need_dh else (0, 0))
    return dh, weight.new_empty(weight.shape if need_dweight else (0, 0), dtype=torch.float32)


@_losses_and_gradients.register_fake
def _(
    h, weight, labels, dloss, ignore_index, softcap, z_loss, chunk_tokens, need_dh, need_dweight, backend
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return h.new_empty((len(h),), dtype=torch.float32), *_empty_gradients(h, weight, need_dh, need_dweight)


class _SummedLoss(torch.autograd.Function):
    """The weighted sum of all losses. Forward computes the gradients too, and backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor | None,
        needs: tuple[bool, bool],
        accumulate: bool,
        settings: tuple[Options, int | None, str],
    ) -> torch.Tensor:
        options, chunk_tokens, backend = settings
        if accumulate and grad_dtype(weight) == torch.float32:
            dh, dweight = _empty_gradients(h, weight, needs[0], False)
            first = weight.grad is None
            grad = new_gradient(weight) if first else weight.grad
            losses = _run_chunks(h, weight, labels, weights, options, chunk_tokens, dh, grad, first, backend)
            weight.grad = grad
        else:
            losses, dh, dweight = _losses_and_gradients(
                h, weight, labels, weights, *options, chunk_tokens, *needs, backend
            )
            if accumulate:  # rounded once, not after each chunk
                give_gradient(weight, dweight, True)
                dweight = dweight.new_empty(0)
        needs = (needs[0], needs[1] and not accumulate)
        ctx.save_for_backward(dh, dweight)
        ctx.needs, ctx.accumulate = needs, accumulate
        return (losses if weights is None else losses * weights).sum()

    @staticmethod
    @once_differentiable  # a second derivative raises instead of being wrong
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = []
        if ctx.accumulate:  # dW is where it belongs already
            torch._assert_async(dloss == 1, "openllama: linear_cross_entropy(accumulate=True): got a scaled loss, takes the scale as weights")  # fmt: skip
        for grad, need in zip(ctx.saved_tensors, ctx.needs):
            if need and torch.compiler.is_compiling():  # a graph plans its memory itself
                grad = (grad * dloss.reshape(1)).to(grad.dtype)
            elif need:
                scale_(grad, dloss)
            grads.append(grad if need else None)
        return *grads, None, None, None, None, None


class _RowLosses(torch.autograd.Function):
    """A loss for each token. Backward makes the logits again, and with each row's gradient known, dh and dW."""

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        settings: tuple[Options, int | None, str],
    ) -> torch.Tensor:
        options, chunk_tokens, backend = settings
        ctx.save_for_backward(h, weight, labels)
        ctx.settings = settings
        losses, _, _ = _losses_and_gradients(
            h, weight, labels, None, *options, chunk_tokens, False, False, backend
        )
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, weight, labels = ctx.saved_tensors
        options, chunk_tokens, backend = ctx.settings
        needs = ctx.needs_input_grad[:2]
        _, *grads = _losses_and_gradients(
            h, weight, labels, dloss.contiguous(), *options, chunk_tokens, *needs, backend
        )
        return *(grad if need else None for grad, need in zip(grads, needs)), None, None
