"""One AdamW step over a list of tensors, in one pass over memory.

    g = grad * grad_scale
    m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr decay) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019. A step is smaller than a bf16 ulp of its weight, so a
bf16 weight needs its low bits elsewhere, or chance: it has an fp32 master; or only the 16 bits of one that it lacks, which is
as exact; or it is rounded stochastically. Moments are fp32, or 16 or 8 bits, rounded stochastically too (adamw_forms.py).
grad_scale, which clips or unscales, is read on the device, so that clipping costs no pass over the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from . import backend as backends
from . import checks, library
from .adamw_forms import (
    BLOCK,
    decode_moment,
    encode_moment,
    join_master,
    random_bits,
    round_to_bf16,
    scales_shape,
    split_master,
)

Number = float | list[float] | tuple[float, ...]
Tensors = Sequence[torch.Tensor]

_CHUNK = 2**20  # elements that the reference works on at once where it converts them: whole blocks


def adamw(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    masters: Tensors = (),
    scales: Tensors = (),
    *,
    lr: Number | torch.Tensor,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    step: Number | torch.Tensor,
    groups: Sequence[int] | None = None,
    grad_scale: torch.Tensor | None = None,
    seed: int = 0,
    firsts: Sequence[int] | None = None,
    backend: str | None = None,
) -> None:
    """Updates params, exp_avgs, exp_avg_sqs (and masters, scales) in place. All on one device, each list of one dtype.

    Each of lr, beta1, beta2, eps, weight_decay and step is a number, or a list of one for each group of tensors; lr and
    step also a tensor of those, (groups,) fp32 on the params' device, which is read there: nothing waits for it, and
    a CUDA graph that holds this call takes what it holds at each replay.

    It can be compiled, but numbers are constants of a graph: each step is a new one. Compile the model, not this.

    Args:
        params: contiguous: fp32, bf16, fp16, or fp64 (with all else in fp64).
        grads: params' shapes, of any float dtypes.
        exp_avgs, exp_avg_sqs: params' shapes; fp32, bf16, or uint8 with `scales`. Zeros to start with; for uint8, 128 in
            exp_avgs.
        masters: params' shapes. fp32 masters of bf16 or fp16 params; for bf16 also int16, the low 16 bits of a master
            whose upper ones are the param's (`adamw_forms.split_master`; zeros to start with). Empty: fp32 params, or
            bf16 ones that are rounded stochastically.
        scales: (2, ceil(size / 256)) fp32 for each tensor where moments are uint8, zeros to start with; else empty.
        step: t, from 1.
        groups: which group's numbers each tensor takes; None: all the first's, or the i-th tensor the i-th's.
        grad_scale: one fp32 number on the params' device, or None for 1.
        seed: of stochastic rounding, from 0 to below 2^32.
        firsts: number of each tensor's first element among all that the optimizer has, which keys its random bits: then
            they don't depend on how tensors are split over calls. None: counted from 0 through `params`.
        backend: `cuda`, `triton`, `cpu`, `reference`; None chooses. `cpu` takes fp32 moments, and masters that are fp32.

    Raises:
        TypeError, ValueError: lists that don't match, a form that isn't there, a non-finite hyper-parameter, a backend
            that can't run; before anything is written.
    """
    if not params:
        return
    checks.is_float("params[0]", params[0])
    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "step": step}
    groups, rows = _group(len(params), groups, hyper)
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {"masters": masters, "scales": scales}
    lrs, steps = (value if isinstance(value, torch.Tensor) else None for value in (lr, step))
    singles = {"lr": lrs, "step": steps, "grad_scale": grad_scale}
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed!r}, takes a whole number from 0 to below 2^32")
    chosen = _choose(params[0], exp_avgs, masters, backend)
    if firsts is None:
        firsts = [0, *accumulate(p.numel() for p in params[:-1])]
    if chosen == "reference":
        _check(lists, groups, len(rows), firsts, singles)
        adamw_reference(*lists.values(), groups, rows, lrs, steps, grad_scale, seed, firsts)
        return
    cast = (torch.float64, torch.float16) if chosen == "cpu" else (torch.float64,)
    try:
        readable = [g.float().contiguous() if g.dtype in cast else g.contiguous() for g in grads]
        numbers = [float(number) for row in rows for number in row]
        library.ops(chosen).adamw_(
            params, readable, exp_avgs, exp_avg_sqs, masters, scales, groups, numbers, lrs, steps, grad_scale, seed, firsts
        )  # fmt: skip
    except (RuntimeError, AttributeError):
        # The op checks all before it writes, but can't name the argument. Checking here first would cost every step.
        _check(lists, groups, len(rows), firsts, singles)
        raise
    # the op can't: a backward that saved a weight before the step must raise, not use the new one
    torch.autograd.graph.increment_version(params)


def _choose(param: torch.Tensor, exp_avgs: Tensors, masters: Tensors, backend: str | None) -> str:
    chosen = backends.choose("adamw", param, backend)
    if chosen != "cpu":
        return chosen
    missing = ""
    if len(exp_avgs) and getattr(exp_avgs[0], "dtype", None) in (torch.bfloat16, torch.uint8):
        missing = f"moments in {exp_avgs[0].dtype}"
    elif param.dtype != torch.float32 and (not len(masters) or masters[0].dtype == torch.int16):
        missing = "bfloat16 params without fp32 masters"
    if missing and (backend or backends.FORCED) == "cpu":
        raise ValueError(
            f"backend: adamw can't run on 'cpu' here: it has no kernel for {missing}; takes None to choose one that can"
        )
    return "reference" if missing else chosen


# ---------------------------------------------------------------- numbers


def _group(count: int, groups: Sequence[int] | None, hyper: dict) -> tuple[list[int], list[tuple]]:
    """Each tensor's group, and each group's numbers in `hyper`'s order; those on the device are 1 there."""
    sizes = {name: len(value) for name, value in hyper.items() if isinstance(value, (list, tuple))}
    sizes |= {name: value.numel() for name, value in hyper.items() if isinstance(value, torch.Tensor)}
    for name in ("beta1", "beta2", "eps", "weight_decay"):
        if isinstance(hyper[name], torch.Tensor):
            raise TypeError(f"{name}: got a tensor, takes numbers")
    size = max([1, *sizes.values()])
    for name, found in sizes.items():
        if found != size:
            raise ValueError(f"{name}: got {found} numbers, takes {size}, one for each group as others have")
    if groups is None and size not in (1, count):
        raise ValueError(
            f"{next(iter(sizes))}: got {size} numbers, takes one for each of {count} params, or `groups`"
        )
    columns = [
        [1] * size if isinstance(value, torch.Tensor) else [value] * size if name not in sizes else value
        for name, value in hyper.items()
    ]
    rows = list(zip(*columns))
    if groups is None and size == 1:
        groups = [0] * count
    elif groups is None and not any(isinstance(value, torch.Tensor) for value in hyper.values()):
        places: dict[tuple, int] = {}  # the kernels want few groups
        groups, rows = [places.setdefault(row, len(places)) for row in rows], list(places)
    elif groups is None:
        groups = range(count)
    for row in rows:
        _check_numbers(*row)
    return list(groups), rows


def _check_numbers(lr, beta1, beta2, eps, weight_decay, step) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        checks.in_range(name, value, 0, 3e38, "a finite number of at least 0")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        checks.in_range(name, value, 0, 1 - 1e-12, "a number from 0 up to, but not, 1")
    checks.in_range("step", step, 1, 2**53, "a whole number from 1 on")
    if step != int(step):
        raise ValueError(f"step: got {step}, takes a whole number from 1 on")


# ---------------------------------------------------------------- checks


def _check(lists: dict[str, Tensors], groups, group_count: int, firsts, singles: dict) -> None:
    """Raises the error that names what is wrong with the tensors."""
    params, state = lists["params"], _form(lists)
    device = params[0].device
    for name, dtype in {"grads": None, **state}.items():
        tensors = lists[name]
        if name in state and dtype is None:
            if tensors:
                pair = "params" if name == "masters" else "exp_avgs"
                raise ValueError(
                    f"{name}: got {len(tensors)} tensors, takes none for {pair} of {lists[pair][0].dtype}"
                )
            continue
        if len(tensors) != len(params):
            raise ValueError(
                f"{name}: got {len(tensors)} tensors, takes one for each of {len(params)} params"
            )
        for i, (t, p) in enumerate(zip(tensors, params)):
            shape = scales_shape(p.numel()) if name == "scales" else p.shape
            checks.has_shape(f"{name}[{i}]", t, shape, f"of params[{i}]'s shape {tuple(p.shape)}")
            checks.same_device(f"{name}[{i}]", t, device, "params[0]")
            if dtype is not None:
                checks.same_dtype(f"{name}[{i}]", t, dtype, "the optimizer state")
                _check_contiguous(f"{name}[{i}]", t)
    for i, p in enumerate(params):
        checks.is_float(f"params[{i}]", p)
        checks.is_float(f"grads[{i}]", lists["grads"][i])
        checks.same_dtype(f"params[{i}]", p, params[0].dtype, "params[0]")
        checks.same_device(f"params[{i}]", p, device, "params[0]")
        _check_contiguous(f"params[{i}]", p)
    for name, numbers in (("groups", groups), ("firsts", firsts)):
        if len(numbers) != len(params):
            raise ValueError(
                f"{name}: got {len(numbers)} numbers, takes one for each of {len(params)} params"
            )
    if not 0 <= min(groups) <= max(groups) < group_count:
        raise ValueError(f"groups: got {min(groups)} to {max(groups)}, takes 0 to {group_count - 1}")
    for name, t in singles.items():
        if t is not None:
            checks.same_dtype(name, t, torch.float32, "the op")
            checks.same_device(name, t, device, "params[0]")
            if name == "grad_scale" and t.numel() != 1:
                raise ValueError(f"grad_scale: got {t.numel()} numbers, takes one")


def _form(lists: dict[str, Tensors]) -> dict[str, torch.dtype | None]:
    """The dtype of each list of the state, by the first tensors; None: the list is empty."""
    param = lists["params"][0].dtype
    wide = torch.float64 if param == torch.float64 else torch.float32
    moment, master = (
        getattr(lists[k][0], "dtype", wide) if lists[k] else None for k in ("exp_avgs", "masters")
    )
    if moment not in (torch.bfloat16, torch.uint8) or wide == torch.float64:
        moment = wide
    if param == wide or (param == torch.bfloat16 and master is None):
        master = None
    elif param != torch.bfloat16 or master != torch.int16:
        master = torch.float32
    scales = torch.float32 if moment == torch.uint8 else None
    return {"exp_avgs": moment, "exp_avg_sqs": moment, "masters": master, "scales": scales}


def _check_contiguous(name: str, t: torch.Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{name}: got strides {t.stride()}, takes a contiguous tensor")


@library.fake("adamw_")
def _(
    params, grads, exp_avgs, exp_avg_sqs, masters, scales, groups, numbers, lrs, steps, grad_scale, seed, firsts
) -> None:  # fmt: skip
    # where one tensor is on `meta`, this is called in the place of the kernel
    for tensors in (grads, exp_avgs, exp_avg_sqs, masters, scales):
        for t, p in zip(tensors, params):
            if t.device != p.device:
                raise RuntimeError("openllama: adamw takes tensors of one device")


# ---------------------------------------------------------------- reference


@torch.no_grad()
def adamw_reference(
    params, grads, exp_avgs, exp_avg_sqs, masters, scales, groups, rows, lrs, steps, grad_scale, seed, firsts
) -> None:  # fmt: skip
    """The definition, group by group. Where state is fp32 (or fp64), as a few multi-tensor (foreach) passes."""
    low = exp_avgs[0].dtype in (torch.bfloat16, torch.uint8) or (
        params[0].dtype == torch.bfloat16 and not (masters and masters[0].dtype == torch.float32)
    )
    for group, (lr, beta1, beta2, eps, weight_decay, step) in enumerate(rows):
        members = [i for i, g in enumerate(groups) if g == group]
        lr, step = (
            lr if lrs is None else lrs.view(-1)[group],
            step if steps is None else steps.view(-1)[group],
        )
        numbers = _numbers(lr, beta1, beta2, eps, weight_decay, step)
        if low:
            for i in members:
                own = (params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], masters[i] if masters else None)
                _step_low(
                    *own, scales[i] if scales else (None, None), numbers, grad_scale, seed, step, firsts[i]
                )
        elif members:
            lists = [[t[i] for i in members] for t in (masters or params, grads, exp_avgs, exp_avg_sqs)]
            _step(*lists, *numbers, grad_scale)
            if masters:
                torch._foreach_copy_([params[i] for i in members], lists[0])


def _numbers(lr, beta1, beta2, eps, weight_decay, step) -> tuple:
    """What a group's elements share, worked out in double: see `_step`."""
    lr, step = (n.double() if isinstance(n, torch.Tensor) else n for n in (lr, step))
    step_size, root_scale = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    return 1 - lr * weight_decay, 1 - beta1, beta2, step_size, root_scale, eps


def _step(
    weights, grads, exp_avgs, exp_avg_sqs, keep, new1, beta2, step_size, root_scale, eps, grad_scale
) -> None:
    """On lists of one dtype. One rounding a pass, so that the results don't depend on where vectors begin and end."""
    dtype = weights[0].dtype
    keep, step_size, root_scale = (
        n.to(dtype) if isinstance(n, torch.Tensor) else n for n in (keep, step_size, root_scale)
    )
    grads = [g.to(dtype) for g in grads]
    if grad_scale is not None:
        grads = torch._foreach_mul(grads, grad_scale.reshape(()).to(dtype))
    changes = torch._foreach_sub(grads, exp_avgs)
    torch._foreach_mul_(changes, new1)
    torch._foreach_add_(exp_avgs, changes)
    squares = torch._foreach_mul(grads, 1 - beta2)
    torch._foreach_mul_(squares, grads)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_add_(exp_avg_sqs, squares)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_mul_(denominators, root_scale)
    torch._foreach_add_(denominators, eps)
    steps = torch._foreach_mul(exp_avgs, step_size)
    torch._foreach_div_(steps, denominators)
    torch._foreach_mul_(weights, keep)
    torch._foreach_sub_(weights, steps)


def _step_low(
    param, grad, exp_avg, exp_avg_sq, master, scales, numbers, grad_scale, seed, step, first
) -> None:  # fmt: skip
    """One tensor whose state is not all fp32: converted, stepped and rounded, chunk by chunk."""
    step = step.long() if isinstance(step, torch.Tensor) else int(step)
    flat = [None if t is None else t.detach().reshape(-1) for t in (param, grad, exp_avg, exp_avg_sq, master)]
    for begin in range(0, param.numel(), _CHUNK):
        p, g, m, v, rest = (None if t is None else t[begin : begin + _CHUNK] for t in flat)
        blocks = slice(begin // BLOCK, (begin + _CHUNK) // BLOCK)
        m_scales, v_scales = (None if s is None else s[blocks] for s in scales)
        bits, m_bits, v_bits = random_bits(first + begin, len(p), seed, step, param.device)
        mean, square = decode_moment(m, m_scales, False), decode_moment(v, v_scales, True)
        remainder = rest is not None and rest.dtype == torch.int16
        weight = join_master(p, rest) if remainder else p.float() if rest is None else rest
        _step([weight], [g], [mean], [square], *numbers, grad_scale)
        for stored, own_scales, x, own_bits in ((m, m_scales, mean, m_bits), (v, v_scales, square, v_bits)):
            rounded, new_scales = encode_moment(x, stored.dtype, x is square, own_bits)
            stored.copy_(rounded)
            if new_scales is not None:
                own_scales.copy_(new_scales)
        if remainder:
            upper, lower = split_master(weight)
            p.copy_(upper), rest.copy_(lower)
        else:
            p.copy_(round_to_bf16(weight, bits) if rest is None and p.dtype == torch.bfloat16 else weight)
