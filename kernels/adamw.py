"""One AdamW step over a list of tensors, in one pass over memory.

    m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr decay) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019. bf16 weights have an fp32 master: the step is taken
there and rounded into the weight, or steps smaller than a bf16 ulp would be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from . import backend as backends
from . import checks, library

_CAST = (torch.float16, torch.float64)  # gradient dtypes that the kernel does not read


def adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    backend: str | None = None,
) -> None:
    """Updates params, exp_avgs, exp_avg_sqs (and masters) in place. All on one device.

    It can be compiled, but lr and step are constants of a graph: each step is a new one. Compile the model, not this.

    Args:
        params: contiguous, all of one dtype: fp32 or bf16.
        grads: params' shapes; fp32 or bf16 are read as they are, others are cast.
        exp_avgs, exp_avg_sqs: fp32, params' shapes.
        masters: fp32 masters of bf16 params, or empty when the params are fp32.
        step: t, from 1.
        backend: `cpu`, `reference`; None chooses.

    Raises:
        TypeError, ValueError: lists that don't match, a non-finite hyper-parameter; before anything is written.
    """
    if not params:
        return
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        checks.in_range(name, value, 0, 3e38, "a finite number of at least 0")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        checks.in_range(name, value, 0, 1 - 1e-12, "a number from 0 up to, but not, 1")
    checks.in_range("step", step, 1, 2**53, "a whole number from 1 on")
    if step != int(step):
        raise ValueError(f"step: got {step}, takes a whole number from 1 on")
    numbers = (lr, beta1, beta2, eps, weight_decay, int(step))
    checks.is_float("params[0]", params[0])
    chosen = backends.choose("adamw", params[0], backend)
    if chosen == "reference":
        _check(params, grads, exp_avgs, exp_avg_sqs, masters)
        adamw_reference(params, grads, exp_avgs, exp_avg_sqs, masters, *numbers)
        return
    device = params[0].device
    if any(
        getattr(t, "device", None) != device for t in chain(params, grads, exp_avgs, exp_avg_sqs, masters)
    ):
        _check(params, grads, exp_avgs, exp_avg_sqs, masters)
    wide = [g.float().contiguous() if g.dtype in _CAST else g.contiguous() for g in grads]
    try:
        groups, firsts = [0] * len(params), [0] * len(params)
        library.ops(chosen).adamw_(
            params,
            wide,
            exp_avgs,
            exp_avg_sqs,
            masters,
            [],
            groups,
            list(map(float, numbers)),
            None,
            None,
            None,
            0,
            firsts,
        )
    except RuntimeError:
        # The op checks all before it writes, but can't name the argument. Checking here first would cost every step.
        _check(params, grads, exp_avgs, exp_avg_sqs, masters)
        raise
    # the op can't: a backward that saved a weight before the step must raise, not use the new one
    torch.autograd.graph.increment_version(params)


def _check(params, grads, exp_avgs, exp_avg_sqs, masters) -> None:
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if params[0].dtype not in (torch.float32, torch.float64):
        lists["masters"] = masters
    elif masters:
        raise ValueError(f"masters: got {len(masters)} tensors, takes none for params of {params[0].dtype}")
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(
                f"{name}: got {len(tensors)} tensors, takes one for each of {len(params)} params"
            )
        for i, (t, p) in enumerate(zip(tensors, params)):
            checks.has_shape(f"{name}[{i}]", t, p.shape, f"params[{i}]'s shape")
            checks.same_device(f"{name}[{i}]", t, params[0].device, "params[0]")
            if name != "grads" and p.dtype != torch.float64:
                checks.same_dtype(f"{name}[{i}]", t, torch.float32, "the optimizer state")
            if name != "grads" and not t.is_contiguous():
                raise ValueError(f"{name}[{i}]: got strides {t.stride()}, takes a contiguous tensor")
    for i, p in enumerate(params):
        checks.is_float(f"params[{i}]", p)
        checks.is_float(f"grads[{i}]", grads[i])
        checks.same_dtype(f"params[{i}]", p, params[0].dtype, "params[0]")
        checks.same_device(f"params[{i}]", p, params[0].device, "params[0]")
        if not p.is_contiguous():
            raise ValueError(f"params[{i}]: got strides {p.stride()}, takes a contiguous tensor")


@library.fake("adamw_")
def _(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    masters,
    scales,
    groups,
    numbers,
    lrs,
    steps,
    grad_scale,
    seed,
    firsts,
) -> None:
    return None


@torch.no_grad()
def adamw_reference(
    params, grads, exp_avgs, exp_avg_sqs, masters, lr, beta1, beta2, eps, weight_decay, step
) -> None:
    """The definition, as a few multi-tensor (foreach) passes: what runs on a GPU until its kernel is there."""
    weights = list(masters) or list(params)
    wide = [g.to(m.dtype) for g, m in zip(grads, exp_avgs)]
    torch._foreach_lerp_(exp_avgs, wide, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, wide, wide, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(weights, exp_avgs, denominators, -lr / (1 - beta1**step))
    if masters:
        torch._foreach_copy_(list(params), weights)
