"""How AdamW's Triton twin rounds: random bits for each element, bf16 by stochastic rounding, a bf16 weight
with the rest of its fp32 number beside it, and moments in 8 bits. ../adamw_forms.py is their definition.

In the leanest form an element moves 14 bytes, so at 3.35 TB/s an H100 has some 120 instructions for it. Hence
the approximations of encode_exp_avg_sq, which are far below what rounding to a code does.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    """A bijection of uint32 in which every bit depends on all: Wellons' lowbias32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_key(seed, step):
    """uint32 of a seed and a step's number, both whole numbers."""
    return _mix(_mix(seed.to(tl.uint32) + 0x9E3779B9) + step.to(tl.uint32))


@triton.jit
def random_bits(key, first, offset):
    """16 bits (uint32) each to round weight, exp_avg and exp_avg_sq of the elements first + offset, which don't
    depend on how tensors are cut. first: int64; offset: a block of whole numbers below 2^32."""
    low = first.to(tl.uint32)
    element = low + offset.to(tl.uint32)
    high = (first >> 32).to(tl.uint32)
    x = element * 0x9E3779B9 + tl.where(element < low, _mix(key + high + 1), _mix(key + high))
    x = (x ^ (x >> 16)) * 0x7FEB352D
    mean = (x ^ (x >> 15)) * 0x846CA68B
    square = mean * 0x9E3779B9
    return (square * 0x9E3779B9) >> 16, mean >> 16, square >> 16


@triton.jit
def to_bf16(x, noise):
    """Rounds fp32 to bf16, up with the probability of the part that is cut off; noise: uint32 below 2^16."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = ((bits + noise) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where(finite, rounded, x.to(tl.bfloat16))


@triton.jit
def join(param, rest):
    """The fp32 number of a bf16 param and an int16 rest: param is the number rounded to nearest (halves away
    from 0), so the upper half of the bits is one less where the rest is 0x8000 or more."""
    low = rest.to(tl.uint16, bitcast=True).to(tl.uint32)
    high = param.to(tl.uint16, bitcast=True).to(tl.uint32)
    return (((high - (low >> 15)) << 16) | low).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """(param, rest) of fp32 numbers."""
    # one NaN for all: the carry of 0x7fffffff would make it -0
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.uint32, bitcast=True))
    param = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return param, (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)


# Scales below it count as it: their reciprocals would overflow.
_TINY = tl.constexpr(2.0**-112)

# 2^23 + i as fp32 has i in its low bits: a conversion at the rate of an addition.
_MAGIC = tl.constexpr(2.0**23)


@triton.jit
def _to_code(x):
    """uint8 of whole numbers from 0 to 255."""
    return (x + _MAGIC).to(tl.uint32, bitcast=True).to(tl.uint8)


# exp_avg: code 128 + q is sign(q) (|q| / 127)^2 times the block's scale, its largest magnitude.


@triton.jit
def decode_exp_avg(code, scale):
    q = code.to(tl.float32) - 128.0
    return q * tl.abs(q) * (scale * (1.0 / 16129.0))


@triton.jit
def encode_exp_avg(m, scale, noise):
    """noise: uint32 below 2^16. Rounds up with the probability that keeps the mean."""
    squared = tl.abs(m) * (16129.0 / tl.maximum(scale, _TINY))  # 127^2 |m| / scale
    q = tl.minimum(tl.floor(tl.sqrt(squared)), 126.0)
    # from q^2 to (q + 1)^2 it is 2 q + 1
    up = noise.to(tl.float32) * (q * 2.0**-15 + 2.0**-16) < squared - q * q
    q = tl.where(up, q + 1.0, q)
    sign = m.to(tl.uint32, bitcast=True) & 0x80000000
    return _to_code((q.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True) + 128.0)


# exp_avg_sq: code c is 2^((c - 255) / 6.375) times the block's scale, its largest: 40 octaves in 255 steps.
# Code 0 is 0.
_PER_OCTAVE = tl.constexpr(6.375)


@triton.jit
def _position(ratio):
    """255 + 6.375 log2(ratio) to 2e-5, for normal numbers up to 1. (Triton's logarithm is exact, in twice as
    many instructions.) 6.375 log2(1 + f) of a number's fraction f is a fitted polynomial, which is 6.375 for
    f = 1."""
    bits = ratio.to(tl.uint32, bitcast=True)
    f = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    part = (((-0.1647391 * f + 0.7764615) * f - 1.7716464) * f + 2.916876) * f - 4.578176
    octaves = (bits >> 23).to(tl.float32) * _PER_OCTAVE - (127 * 6.375 - 255)
    return octaves + (part * f + 9.196224) * f


@triton.jit
def decode_exp_avg_sq(code, scale):
    c = code.to(tl.float32)
    return tl.where(c == 0.0, 0.0, tl.exp2((c - 255.0) * (1.0 / _PER_OCTAVE)) * scale)


@triton.jit
def encode_exp_avg_sq(v, scale, noise):
    t = _position(v * (1.0 / tl.maximum(scale, _TINY)))
    c = tl.maximum(tl.minimum(tl.floor(t), 254.0), 1.0)
    # how far v is between what c and c + 1 stand for, (2^(d / 6.375) - 1) / (2^(1 / 6.375) - 1), in 2^-16:
    # fitted, to 1e-6 of the whole
    d = t - c
    part = d * ((d * (65536 * 0.00196983) + 65536 * 0.05140082) * d + 65536 * 0.94662935)
    c = tl.where(noise.to(tl.float32) < part, c + 1.0, c)
    return _to_code(tl.where(v > 0.0, c, 0.0))


# ---------------------------------------------------------------- moments in any form


@triton.jit
def load_moments(exp_avg, exp_avg_sq, scales, blocks, block, at, inside):
    """exp_avg and exp_avg_sq in fp32 of elements `at` (blocks, 256), whose blocks are `block` (blocks)."""
    if exp_avg.dtype.element_ty == tl.uint8:
        there = block < blocks
        m = decode_exp_avg(
            tl.load(exp_avg + at, mask=inside, other=128),
            tl.load(scales + block, mask=there, other=0.0)[:, None],
        )
        v = decode_exp_avg_sq(
            tl.load(exp_avg_sq + at, mask=inside, other=0),
            tl.load(scales + blocks + block, mask=there, other=0.0)[:, None],
        )
    else:
        m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
    return m, v


@triton.jit
def store_moments(exp_avg, exp_avg_sq, scales, blocks, block, at, inside, m, v, m_noise, v_noise):
    if exp_avg.dtype.element_ty == tl.uint8:
        there = block < blocks
        m_scale, v_scale = tl.max(tl.abs(m), axis=1), tl.max(v, axis=1)
        tl.store(scales + block, m_scale, mask=there)
        tl.store(scales + blocks + block, v_scale, mask=there)
        tl.store(exp_avg + at, encode_exp_avg(m, m_scale[:, None], m_noise), mask=inside)
        tl.store(exp_avg_sq + at, encode_exp_avg_sq(v, v_scale[:, None], v_noise), mask=inside)
    elif exp_avg.dtype.element_ty == tl.bfloat16:
        tl.store(exp_avg + at, to_bf16(m, m_noise), mask=inside)
        tl.store(exp_avg_sq + at, to_bf16(v, v_noise), mask=inside)
    else:
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
