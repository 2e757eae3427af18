"""AdamW's Triton twin: the formulas are in ../adamw.py, the forms of its state in ../adamw_forms.py.

One launch for the whole list: a program takes 8,192 elements of one tensor, in tiles. What it needs to know
of the tensor and of its group comes from a table that is copied to the device with each call.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import lists
from .codecs import join, load_moments, random_bits, random_key, split, store_moments, to_bf16
from .common import guard
from .lists import find, pointer

_CHUNK = 8_192  # elements of a program: enough to make its search in the table a few per cent of its time
# With 4 warps 8 elements a thread: one 16-byte access of bf16, and one block of 8-bit moments a warp.
_TILE = 1_024

_GRADS = (torch.float32, torch.bfloat16, torch.float16)

# (params' dtype, masters' dtype or None): where the exact weight is.
_MASTERS = {
    (torch.float32, None): "param",
    (torch.bfloat16, torch.float32): "fp32",
    (torch.float16, torch.float32): "fp32",
    (torch.bfloat16, torch.int16): "remainder",
    (torch.bfloat16, None): "none",
}

# Of the table: lr, beta2, eps, weight_decay, 1 - beta1, 1 - beta2, log(beta1), log(beta2), step.
_GROUP_NUMBERS = 9


@triton.jit
def _one_minus_power(log_beta, step):
    """1 - beta^step = -expm1(x), in fp32 without the loss of 1 - (a number near 1)."""
    x = step * log_beta
    series = 1.0 + x * (1.0 / 8.0)
    for i in tl.static_range(7, 1, -1):
        series = 1.0 + series * x * (1.0 / i)
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _number(group, i: tl.constexpr):
    """A double of the table, as fp32."""
    return tl.load(group + i).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["count", "seed"])
def _adamw(
    table, lrs, steps, grad_scale, count, seed,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr,
    UNIT: tl.constexpr, NUMBERS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """MASTER: where the exact weight is: param, fp32, remainder (beside the param) or none."""
    chunk = tl.program_id(0)
    tensor = find(table, count, chunk)
    entry = table + tensor  # column i of this tensor is at entry + i * count
    size = tl.load(entry + count) * UNIT
    first = tl.load(entry + 2 * count)
    group_index = tl.load(entry + 3 * count)
    param = pointer(tl.load(entry + 4 * count), UNIT, PARAM)
    grad = pointer(tl.load(entry + 5 * count), UNIT, GRAD)
    exp_avg = pointer(tl.load(entry + 6 * count), UNIT, MOMENT)
    exp_avg_sq = pointer(tl.load(entry + 7 * count), UNIT, MOMENT)
    master_address = tl.load(entry + 8 * count)
    scales = pointer(tl.load(entry + 9 * count), 1, tl.float32)

    group = table + 10 * count + NUMBERS * group_index
    lr = _number(group, 0) if lrs is None else tl.load(lrs + group_index)
    beta2, eps, new1, new2 = _number(group, 1), _number(group, 2), _number(group, 4), _number(group, 5)
    step = tl.load(group + 8).to(tl.float64, bitcast=True)
    if steps is not None:
        step = tl.load(steps + group_index).to(tl.float64)
    time = step.to(tl.float32)
    decay = lr * _number(group, 3)
    step_size = lr / _one_minus_power(_number(group, 6), time)
    root_scale = 1.0 / tl.sqrt(_one_minus_power(_number(group, 7), time))
    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    key = random_key(seed, step.to(tl.int64))

    row = tl.arange(0, TILE // 256)
    local = row[:, None] * 256 + tl.arange(0, 256)[None, :]  # (TILE / 256, 256)
    begin = (chunk - tl.load(entry)) * CHUNK
    for start in range(begin, tl.minimum(begin + CHUNK, size), TILE):
        at = start + local
        inside = at < size
        blocks, block = (size + 255) // 256, start // 256 + row
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * scale
        m, v = load_moments(exp_avg, exp_avg_sq, scales, blocks, block, at, inside)
        if MASTER == "fp32":
            w = tl.load(pointer(master_address, UNIT, tl.float32) + at, mask=inside, other=0.0)
        elif MASTER == "remainder":
            rest = tl.load(pointer(master_address, UNIT, tl.int16) + at, mask=inside, other=0)
            w = join(tl.load(param + at, mask=inside, other=0.0), rest)
        else:
            w = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
        m += (g - m) * new1
        v = beta2 * v + new2 * g * g
        # not w (1 - decay) - ..., whose factor would be rounded to a step of 6e-8
        w -= decay * w + step_size * m / (tl.sqrt(v) * root_scale + eps)
        w_noise, m_noise, v_noise = random_bits(key, first + begin, at - begin)
        store_moments(exp_avg, exp_avg_sq, scales, blocks, block, at, inside, m, v, m_noise, v_noise)
        if MASTER == "fp32":
            tl.store(pointer(master_address, UNIT, tl.float32) + at, w, mask=inside)
        if MASTER == "remainder":
            new_param, rest = split(w)
            tl.store(pointer(master_address, UNIT, tl.int16) + at, rest, mask=inside)
        elif MASTER == "none":
            new_param = to_bf16(w, w_noise)
        else:
            new_param = w.to(PARAM)
        tl.store(param + at, new_param, mask=inside)


def adamw_(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor], exp_avg_sqs: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor], scales: Sequence[torch.Tensor],
    groups: Sequence[int], numbers: Sequence[float], lrs: torch.Tensor | None, steps: torch.Tensor | None,
    grad_scale: torch.Tensor | None, seed: int, firsts: Sequence[int],
) -> None:  # fmt: skip
    """One step, in place; `numbers` are lr, beta1, beta2, eps, weight_decay and step of each group."""
    if not len(params):
        return
    master = _checked_form(
        params, grads, exp_avgs, exp_avg_sqs, masters, scales, groups, numbers, lrs, steps, grad_scale, firsts
    )
    # a launch for each dtype of gradients, and another for tensors that 16-byte accesses don't suit
    sets = defaultdict(list)
    columns = [params, grads, exp_avgs, exp_avg_sqs, masters, scales]
    addresses = zip(*([t.data_ptr() for t in column] or [0] * len(params) for column in columns))
    for p, g, first, group, at in zip(params, grads, firsts, groups, addresses):
        if size := p.numel():
            sets[g.dtype, lists.unit(size, at[:-1])].append((size, first, group, *at))
    all_numbers = [bits for i in range(0, len(numbers), 6) for bits in _group_numbers(*numbers[i : i + 6])]
    for (dtype, unit), entries in sets.items():
        table, chunks = lists.table(_CHUNK, unit, *zip(*entries))
        with guard(params[0]):
            _adamw[(chunks,)](
                lists.to_device([*table, *all_numbers], params[0].device), lrs, steps, grad_scale,
                len(entries), seed & 0xFFFFFFFF,
                PARAM=lists.DTYPES[params[0].dtype], GRAD=lists.DTYPES[dtype],
                MOMENT=lists.DTYPES[exp_avgs[0].dtype], MASTER=master, UNIT=unit,
                NUMBERS=_GROUP_NUMBERS, CHUNK=_CHUNK, TILE=_TILE, num_warps=4,
            )  # fmt: skip


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"openllama: adamw takes {what}")


def _checked_form(
    params, grads, exp_avgs, exp_avg_sqs, masters, scales, groups, numbers, lrs, steps, grad_scale, firsts
) -> str:
    """MASTER of the kernel. Raises, as the native op does, before anything is written; ../adamw.py then names
    what is wrong."""
    beside = [grads, exp_avgs, exp_avg_sqs, groups, firsts, *(c for c in (masters, scales) if len(c))]
    _require(all(len(c) == len(params) for c in beside), "lists of one length")
    _require(len(numbers) % 6 == 0, "six numbers a group")
    count, device = len(numbers) // 6, params[0].device
    _require(all(0 <= group < count for group in groups), "groups that have numbers")
    param, moment = params[0].dtype, exp_avgs[0].dtype
    master = masters[0].dtype if len(masters) else None
    _require(
        (param, master) in _MASTERS,
        "fp32 params; or bf16 or fp16 with fp32 masters; or bf16 with int16 or none",
    )
    _require(moment in (torch.float32, torch.bfloat16, torch.uint8), "moments in float32, bfloat16 or uint8")
    _require(
        len(scales) == (len(params) if moment == torch.uint8 else 0), "scales where the moments are uint8"
    )

    def flat(t: torch.Tensor, dtype: torch.dtype, size: int) -> bool:
        return t.is_contiguous() and t.dtype == dtype and t.device == device and t.numel() == size

    for i, p in enumerate(params):
        beside = [(p, param), (exp_avgs[i], moment), (exp_avg_sqs[i], moment), (grads[i], grads[i].dtype)]
        beside += [(masters[i], master)] if master else []
        same = all(flat(t, dtype, p.numel()) and t.shape == p.shape for t, dtype in beside)
        same &= grads[i].dtype in _GRADS
        same &= not len(scales) or flat(scales[i], torch.float32, 2 * -(-p.numel() // 256))
        _require(same, "contiguous tensors of one shape, device and form")
    for t, size in ((lrs, count), (steps, count), (grad_scale, 1)):
        _require(
            t is None or flat(t, torch.float32, size), "lrs and steps (groups) and grad_scale (1) in fp32"
        )
    return _MASTERS[param, master]


def _group_numbers(lr: float, beta1: float, beta2: float, eps: float, decay: float, step: float) -> list[int]:
    """_GROUP_NUMBERS doubles, as the whole numbers of their bits."""
    logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    doubles = (lr, beta2, eps, decay, 1 - beta1, 1 - beta2, *logs, step)
    return list(struct.unpack(f"{_GROUP_NUMBERS}q", struct.pack(f"{_GROUP_NUMBERS}d", *doubles)))
