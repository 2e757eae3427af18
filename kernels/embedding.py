"""Embedding: rows of a table, by id.

    y[i] = weight[ids[i]],   dweight[id] = sum of dy[i] over the i with ids[i] == id

Ids repeat (a frequent token thousands of times in a batch), so the sum is in fp32 and rounded once. The ids are sorted
first, so that a row's gradients are added one after the other, always in the same order: no atomics, and two runs give
the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import backend as backends
from . import checks, library
from .matmul import accumulates, give_gradient, grad_dtype, new_gradient


def embedding(
    ids: torch.Tensor, weight: torch.Tensor, *, accumulate: bool = False, backend: str | None = None
) -> torch.Tensor:
    """weight[ids].

    Args:
        ids: (...), int64 or int32, from 0 to below vocab.
        weight: (vocab, hidden), fp32, bf16, fp16 or fp64.
        accumulate: backward adds to `weight.grad` itself and gives autograd no gradient: where there is one already, nothing
            of the table's size is made. Not for torch.autograd.grad.
        backend: of the gradient, `cuda`, `triton`, `reference`; None chooses.

    Returns:
        (..., hidden) in weight's dtype.

    Saves the ids for backward. The gradient is fp32 where `weight.grad_dtype` is that, else of weight's dtype.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; an id outside the table, by its value (on the CPU; a GPU
        stops with a device assert).
    """
    checks.is_integer("ids", ids)
    checks.is_float("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, takes (vocab, hidden)")
    checks.same_device("ids", ids, weight.device, "weight")
    _check_ids(ids, len(weight))
    return _Embedding.apply(
        ids, weight, accumulates(weight, accumulate), backends.choose("embedding", weight, backend)
    )


def _check_ids(ids: torch.Tensor, vocab: int) -> None:
    """On the CPU only, as the values of a GPU tensor would have to be waited for; the lookup there checks by itself."""
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= vocab:
            raise ValueError(
                f"ids: got {low if low < 0 else high}, takes 0 to {vocab - 1} (the rows of the table)"
            )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, accumulate: bool, backend: str
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.backend = weight.shape, grad_dtype(weight), backend
        ctx.weight = weight if accumulate else None  # whose gradient it adds to; its values are not read
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable  # a second derivative raises instead of being wrong
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ids, (vocab, hidden) = ctx.saved_tensors[0].reshape(-1).to(torch.int64), ctx.shape
        dy = checks.rows(dy, hidden)
        if ctx.backend == "reference":
            dweight = embedding_backward_reference(dy, ids, vocab)
            if ctx.weight is None:
                return None, dweight.to(ctx.dtype), None, None
            return None, give_gradient(ctx.weight, dweight, True), None, None
        sorted_ids, order = torch.sort(ids, stable=True)
        if ctx.weight is None:
            dweight = dy.new_zeros((vocab, hidden), dtype=ctx.dtype)
        else:
            grad = ctx.weight.grad
            dweight = new_gradient(ctx.weight).zero_() if grad is None else grad
        library.ops(ctx.backend).embedding_bwd_(dweight, dy, sorted_ids, order)
        if ctx.weight is None:
            return None, dweight, None, None
        ctx.weight.grad = dweight
        return None, None, None, None


@library.fake("embedding_bwd_")
def _(dweight: torch.Tensor, dy, ids, order) -> None:
    return None


def embedding_backward_reference(dy: torch.Tensor, ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """The definition, (vocab, hidden) in fp32 (fp64 for fp64 inputs): PyTorch's, which is in dy's dtype, on a wide dy."""
    wide = dy if dy.dtype == torch.float64 else dy.float()
    return torch.ops.aten.embedding_dense_backward(wide, ids, vocab, -1, False)
