"""How AdamW's state is kept in fewer bits: rounding, a master in two halves, 8-bit moments, random bits.

Plain PyTorch on flat tensors: the definition that the kernels of adamw follow, and what turns the state of one form into
another's. Moments of 16 and 8 bits are rounded stochastically: an exponential average moves by less than their
spacing, and rounding to the nearest would lose that. Scales of blocks are from Dettmers et al., "8-bit Optimizers via
Block-wise Quantization", 2022; the codes are ours: exp_avg on a quadratic scale, which has its small values too, and
exp_avg_sq on a logarithmic one, as it is its relative error that counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Neighbouring elements of a flat tensor that share a scale of 8-bit moments.
BLOCK = 256

#: In the place of 16 random bits: rounds to the nearest.
NEAREST = 0x8000

_ALL = 0xFFFFFFFF  # the bits of a uint32, which is an int64 here
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio
_PER_OCTAVE = 255 / 40  # codes of exp_avg_sq: 40 octaves below a block's largest value
_NAN = 0x7FC00000


# ---------------------------------------------------------------- random bits


def _mix(x):
    """Wellons' lowbias32, a bijection of uint32 whose outputs for neighbours look unrelated. Products of int64 wrap."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor & _ALL
    return x ^ (x >> 16)


def random_bits(first: int, count: int, seed: int, step, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Three times 16 bits for each of the elements first, first + 1, ...: to round weight, exp_avg and exp_avg_sq.

    They are a hash of (seed, step, element's number), so they don't depend on how elements lie in tensors or chunks.
    `step` is an int, or an int64 tensor of one element on `device`.
    """
    key = _mix(_mix(seed + _GOLDEN & _ALL) + step & _ALL)
    element = torch.arange(first, first + count, device=device)
    x = (element & _ALL) * _GOLDEN + _mix(key + (element >> 32) & _ALL) & _ALL
    x = (x ^ (x >> 16)) * 0x7FEB352D & _ALL
    mean = (x ^ (x >> 15)) * 0x846CA68B & _ALL
    square = mean * _GOLDEN & _ALL
    weight = square * _GOLDEN & _ALL
    return weight >> 16, mean >> 16, square >> 16


# ---------------------------------------------------------------- bf16


def round_to_bf16(x: torch.Tensor, bits: torch.Tensor | int) -> torch.Tensor:
    """fp32 `x` in bf16, away from zero with a chance of the cut-off bits over 2^16, by 16 random `bits`."""
    rounded = (x.view(torch.int32) + bits) >> 16
    return torch.where(x.isfinite(), rounded.to(torch.int16).view(torch.bfloat16), x.bfloat16())


def split_master(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 `x` as bf16, rounded to the nearest (ties away from zero, which can be undone), and its low 16 bits, int16.

    All NaNs become one: half of the others would round to a zero.
    """
    bits = torch.where(x.isnan(), _NAN, x.view(torch.int32))
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(param: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 number that `split_master` split."""
    low = remainder.int() & 0xFFFF
    return ((param.view(torch.int16).int() - (low >> 15)) << 16 | low).view(torch.float32)


# ---------------------------------------------------------------- moments


def decode_moment(stored: torch.Tensor, scales: torch.Tensor | None, square: bool) -> torch.Tensor:
    """A flat moment in fp32: stored in fp32, in bf16, or in uint8 with a scale for each 256 elements.

    `square` tells exp_avg_sq from exp_avg. fp32 comes back as it is, not copied.
    """
    if stored.dtype != torch.uint8:
        return stored.float()
    assert scales is not None
    values = _values(square, stored.device)[stored.int()] * _spread(scales, len(stored))
    return torch.where(stored > 0, values, 0) if square else values  # also where the scale is infinite


def encode_moment(
    x: torch.Tensor, dtype: torch.dtype, square: bool, bits: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The flat fp32 moment `x` in `dtype`, rounded by 16 random `bits` an element; for uint8 with its scales.

    A NaN is lost in 8 bits, and leaves its block's scale alone: the weight has it.
    """
    if dtype == torch.bfloat16:
        return round_to_bf16(x, bits), None
    if dtype != torch.uint8:
        return x, None
    known = torch.where(x.isnan(), 0, x.abs())
    scales = F.pad(known, (0, -len(x) % BLOCK)).view(-1, BLOCK).amax(1)
    share = x.abs() / _spread(scales, len(x))
    if square:
        lower = (255 + _PER_OCTAVE * share.log2()).floor().nan_to_num(1.0).clamp(1, 254)
    else:
        lower = (share.sqrt() * 127).floor().nan_to_num(126.0).clamp(max=126) + 128
    lower = lower.int()
    low, high = (_values(square, x.device)[lower + i] for i in (0, 1))
    code = lower + (bits * 2.0**-16 < (share - low) / (high - low))
    if square:
        code = torch.where(x > 0, code, 0)
    else:
        code = torch.where(x < 0, 256 - code, code)
        code = torch.where(_spread(scales, len(x)) == 0, 128, code)
    return code.to(torch.uint8), scales


def scales_shape(size: int) -> tuple[int, int]:
    """Of the scales of both 8-bit moments of a tensor: those of exp_avg, then those of exp_avg_sq."""
    return 2, -(-size // BLOCK)


def _spread(scales: torch.Tensor, size: int) -> torch.Tensor:
    """Each element's scale."""
    return scales[:, None].expand(-1, BLOCK).reshape(-1)[:size]


def _values(square: bool, device: torch.device) -> torch.Tensor:
    """(256,), what each code is worth where the scale is 1; code 0 of exp_avg_sq is a zero besides."""
    code = torch.arange(256, dtype=torch.float64, device=device)
    if square:
        return torch.exp2((code - 255) / _PER_OCTAVE).float()
    return ((code - 128) / 127).square().copysign(code - 128).float()
