"""The gradient of a linear layer's weight, dW = dy^T x, added up where it is made.

Micro-batches, and chunks of one, add to the same dW. The sum rides in the matrix product (its beta is 1), which reads and
writes dW once; a product by itself, added by autograd, moves three times as much. Products and sums are fp32 inside, and
stay it where dW is fp32.
"""

from __future__ import annotations

import torch


def weight_gradient_(dweight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, first: bool) -> None:
    """dweight = dy^T x where it is the first, else dweight += dy^T x; unchecked.

    dweight: (out, in), x's dtype or fp32; dy: (tokens, out); x: (tokens, in). Rows contiguous.
    """
    a, beta = dy.t(), 0 if first else 1
    if dweight.dtype == x.dtype:
        torch.addmm(dweight, a, x, beta=beta, out=dweight)
    elif not x.is_cuda:  # which has no product of mixed dtypes
        torch.addmm(dweight, a.float(), x.float(), beta=beta, out=dweight)
    elif first:
        torch.mm(a, x, out_dtype=torch.float32, out=dweight)
    else:
        torch.addmm(dweight, a, x, out_dtype=torch.float32, out=dweight)


def grad_dtype(weight: torch.Tensor) -> torch.dtype:
    """fp32 where the weight takes its gradient so (`weight.grad_dtype`), so that sums are not rounded on their way."""
    if torch.compiler.is_compiling() or not weight.is_leaf or weight.grad_dtype != torch.float32:
        return weight.dtype
    return torch.float32


def give_gradient(weight: torch.Tensor, dweight: torch.Tensor | None, accumulate: bool) -> torch.Tensor | None:
    """What a backward returns for `weight`: dweight; or None, where it goes into `weight.grad` itself."""
    if dweight is None or not accumulate:
        return None if dweight is None else dweight.to(grad_dtype(weight))
    if weight.grad is None:
        weight.grad = dweight.to(grad_dtype(weight))
    else:
        weight.grad += dweight
    return None


def linear_weight_gradient(
    weight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, accumulate: bool
) -> torch.Tensor | None:
    """dW = dy^T x for a backward to return; or None, where it is added to `weight.grad` in the product."""
    if accumulate and weight.grad is not None:
        weight_gradient_(weight.grad, dy, x, first=False)
        return None
    dweight = torch.empty_like(weight, dtype=grad_dtype(weight), requires_grad=False)
    weight_gradient_(dweight, dy, x, first=True)
    return give_gradient(weight, dweight, accumulate)
