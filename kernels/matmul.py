"""Matrix products of training: out = a b, or out += a b, in one call.

The sum rides in the product: a weight's gradient dW = dy^T x adds to what earlier micro-batches, or chunks of one, left
there, and dW is read and written once; a product by itself, added by autograd, moves three times as much. Products and
sums are fp32 inside, and stay it where `out` is fp32.

On a GPU they run on torch's own cuBLASLt, with the fastest of the algorithms that it proposes (csrc/binding/matmul.cpp);
torch takes the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import backend as backends
from . import checks, library


@torch.no_grad()
def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    *,
    tune: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """a @ b, written to `out` or added to it. Has no gradient: it is what backwards are made of.

    Args:
        a, b: (m, k) and (k, n), of one dtype; what has contiguous rows or columns, like a transposed view, is read as it is.
        out: (m, n), rows contiguous (a slice of wider rows will do), in a's dtype or fp32; None: a new one in a's.
        accumulate: add to `out` instead.
        tune: on a GPU, time cuBLASLt's algorithms at the third call of a shape (some 20 ms, once) and take the fastest from
            then on. Not where torch is to be deterministic: runs might differ in their last bits.
        backend: `cublaslt` (bf16 and fp16), `reference`; None chooses.

    Returns:
        out.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, or a backend that can't run.
    """
    _check(a, b, out, accumulate)
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]))
    chosen = backends.choose("matmul", a, backend)
    if chosen == "cublaslt" and out.numel() and a.numel():
        tune = tune and not torch.are_deterministic_algorithms_enabled()
        torch.ops.openllama.matmul_(out, _readable(a), _readable(b), accumulate, tune)
        return out
    return matmul_reference(a, b, out, accumulate)


def _readable(t: torch.Tensor) -> torch.Tensor:
    """`t`, or a copy where neither its rows nor its columns are contiguous."""
    rows, columns = t.shape
    by_rows = (columns == 1 or t.stride(1) == 1) and (rows == 1 or t.stride(0) >= columns)
    by_columns = (rows == 1 or t.stride(0) == 1) and (columns == 1 or t.stride(1) >= rows)
    return t if by_rows or by_columns else t.clone(memory_format=torch.contiguous_format)


def _check(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None, accumulate: bool) -> None:
    checks.is_float("a", a)
    checks.same_dtype("b", b, a.dtype, "a")
    checks.same_device("b", b, a.device, "a")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a, b: got shapes {tuple(a.shape)} and {tuple(b.shape)}, takes (m, k) and (k, n)")
    if out is None:
        if accumulate:
            raise ValueError("out: got None, takes a tensor to add to with accumulate=True")
        return
    checks.has_shape("out", out, (a.shape[0], b.shape[1]), "a's rows, b's columns")
    checks.same_device("out", out, a.device, "a")
    rows, columns = out.shape
    if out.numel() and ((columns > 1 and out.stride(1) != 1) or (rows > 1 and out.stride(0) < columns)):
        raise ValueError(f"out: got strides {out.stride()}, takes contiguous rows that don't overlap")
    if out.dtype not in (a.dtype, torch.float32):
        raise TypeError(f"out: got {out.dtype}, takes a's {a.dtype} or torch.float32")


@library.fake("matmul_")
def _(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, accumulate: bool, tune: bool) -> None:
    return None


def matmul_reference(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool = False
) -> torch.Tensor:
    """The definition: PyTorch's products."""
    if a.dtype != out.dtype and not a.is_cuda:  # which has no product of mixed dtypes
        a, b = a.float(), b.float()
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=1 if accumulate else 0, out=out)
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


@torch.no_grad()
def linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] = (),
    *,
    tune: bool = True,
) -> torch.Tensor:
    """The outputs of several linear layers side by side: (tokens, sum of n), of x (tokens, hidden), weights (n, hidden) and,
    for each of them or none, biases (n,). `tune`: as in `matmul`."""
    widths = [len(w) for w in weights]
    out = x.new_empty(len(x), sum(widths))
    if biases:  # what the products add to: so the sum is rounded once
        out.copy_(torch.cat(tuple(biases)).expand_as(out))
    for weight, part in zip(weights, out.split(widths, dim=1)):
        matmul(x, weight.t(), part, accumulate=bool(biases), tune=tune)
    return out


# ---------------------------------------------------------------- gradients of weights


def grad_dtype(weight: torch.Tensor) -> torch.dtype:
    """fp32 where the weight takes its gradient so (`weight.grad_dtype`), so that sums are not rounded on their way."""
    if torch.compiler.is_compiling() or not weight.is_leaf or weight.grad_dtype != torch.float32:
        return weight.dtype
    return torch.float32


def empty_gradient(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=grad_dtype(weight), device=weight.device)


def new_gradient(weight: torch.Tensor) -> torch.Tensor:
    """Room for a step's first gradient to become `weight.grad`: `weight.grad_buffer`, where that was kept for it."""
    kept = getattr(weight, "grad_buffer", None)
    return empty_gradient(weight) if kept is None else kept


def accumulates(weight: torch.Tensor, asked: bool) -> bool:
    """Whether gradients go into `weight.grad`: not of what was computed from other weights, nor in a compiled graph."""
    return asked and weight.is_leaf and not torch.compiler.is_compiling()


def give_gradient(
    weight: torch.Tensor, dweight: torch.Tensor | None, accumulate: bool
) -> torch.Tensor | None:
    """What a backward returns for `weight`: dweight; or None, where it goes into `weight.grad` itself."""
    if dweight is None or not accumulates(weight, accumulate):
        return None if dweight is None else dweight.to(grad_dtype(weight))
    if weight.grad is None:
        weight.grad = new_gradient(weight).copy_(dweight)
    else:
        weight.grad += dweight
    return None


def linear_weight_gradient(
    weight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, accumulate: bool
) -> torch.Tensor | None:
    """dW = dy^T x for a backward to return; or None, where it goes into `weight.grad` itself, in the product.

    dy: (tokens, out), x: (tokens, in), of one dtype.
    """
    accumulate = accumulates(weight, accumulate)
    first = not accumulate or weight.grad is None
    dweight = weight.grad
    if first:
        dweight = new_gradient(weight) if accumulate else empty_gradient(weight)
    assert dweight is not None
    matmul(dy.t(), x, dweight, accumulate=not first)
    if not accumulate:
        return dweight
    weight.grad = dweight
    return None
