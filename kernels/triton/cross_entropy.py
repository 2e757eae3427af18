"""Cross-entropy's Triton twin: the formulas are in ../cross_entropy.py and csrc/ops.h.

A program takes a row. Rows of an odd vocabulary start anywhere, so a row is cut into whole groups of 16
bytes, each read with one access, and its two ends, read one by one; tiles of groups keep to cache lines.
Forward keeps a running maximum and a sum for each group's place in the tile, not for each element: one
exponential an element and one a group. The gradient is written as if no column were the label's, whose own is
put right afterwards, and from the row's end: where forward came just before, that lies in L1 or L2 still.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import guard

_LOG2E = tl.constexpr(1.4426950408889634)
_LINE = tl.constexpr(8)  # groups in a cache line of 128 bytes


@triton.jit
def _capped(logits, softcap, CAPPED: tl.constexpr):
    """softcap tanh(logits / softcap), or the logits; fp32."""
    x = logits.to(tl.float32)
    if CAPPED:
        t = x / softcap
        square = t * t
        # for small t by a polynomial (Cephes' tanhf), as 1 - 2 / (exp(2 t) + 1) would cancel
        small = square * -5.70498873e-3 + 2.06390888e-2
        small = small * square - 5.37397156e-2
        small = small * square + 1.33314422e-1
        small = small * square - 3.33332819e-1
        x = softcap * tl.where(square < 0.39, small * square * t + t, 1.0 - 2.0 / (tl.exp(2.0 * t) + 1.0))
    return x


@triton.jit
def _cut(offset, vocab, VECTOR: tl.constexpr):
    """(columns before the first whole group, number of whole groups, groups of the first one's cache line that
    lie before it) of a row that starts at `offset`."""
    first = tl.minimum(((VECTOR - offset % VECTOR) % VECTOR).to(tl.int32), vocab)
    return first, (vocab - first) // VECTOR, ((offset + first) // VECTOR % _LINE).to(tl.int32)


@triton.jit
def _end_columns(first, groups, VECTOR: tl.constexpr):
    """The columns outside the whole groups, (2 * VECTOR), of which those below vocab are there."""
    i = tl.arange(0, 2 * VECTOR)
    return tl.where(i < first, i, groups * VECTOR + i)


@triton.jit
def _group_columns(group, VECTOR: tl.constexpr):
    """Columns (GROUPS, VECTOR) after the first whole group's."""
    return group[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _exp(x, above, WIDE: tl.constexpr):
    """exp(x - above), without tl.exp's care for denormal numbers. Of logits of 16 bits (not WIDE) with `above`'s own
    rounding, the same for all of a sum, as their rounding hides it."""
    if WIDE:
        return tl.exp2((x - above) * _LOG2E)
    return tl.exp2(x * _LOG2E - above * _LOG2E)


@triton.jit
def _forward(
    logits, offset, label, ignored, vocab, softcap, z_loss,
    CAPPED: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(loss, top, log_sum, at_label) of the row at `offset`; the first three are 0 where it is ignored, NaN for
    an impossible label."""
    valid = (label >= 0) & (label < vocab) & (ignored == 0)
    # nothing is read of a row without a label
    first, groups, before = _cut(offset, tl.where(valid, vocab, 0), VECTOR)
    # a multiple of VECTOR: so Triton knows it
    start = logits + (offset + first) // VECTOR * VECTOR
    WIDE: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth > 16
    tops = tl.full((GROUPS,), float("-inf"), tl.float32)
    sums = tl.zeros((GROUPS,), tl.float32)
    for begin in range(-before, groups, GROUPS):
        group = begin + tl.arange(0, GROUPS)
        inside = ((group >= 0) & (group < groups))[:, None]
        x = tl.load(start + _group_columns(group, VECTOR), mask=inside, other=float("-inf"))
        x = _capped(x, softcap, CAPPED)
        if CAPPED:  # which is finite at -inf
            x = tl.where(inside, x, float("-inf"))
        new = tl.maximum(tops, tl.max(x, axis=1))
        above = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
        sums = sums * _exp(tops, above, WIDE) + tl.sum(_exp(x, above[:, None], WIDE), axis=1)
        tops = new
    ends = _end_columns(first, groups, VECTOR)
    inside = valid & (ends < vocab)
    x = _capped(tl.load(logits + offset + ends, mask=inside, other=0.0), softcap, CAPPED)
    x = tl.where(inside, x, float("-inf"))
    top = tl.maximum(tl.max(tops, axis=0), tl.max(x, axis=0))
    above = tl.where(top == float("-inf"), 0.0, top)
    log_sum = tl.log(tl.sum(sums * tl.exp(tops - above), axis=0) + tl.sum(tl.exp(x - above), axis=0))
    at_label = _capped(tl.load(logits + offset + label, mask=valid, other=0.0), softcap, CAPPED)
    s = top + log_sum
    # not 0 * inf, which is NaN
    loss = log_sum - (at_label - top) + tl.where(z_loss == 0.0, 0.0, z_loss * s * s)
    other = tl.where(ignored, 0.0, float("nan"))
    return (
        tl.where(valid, loss, other),
        tl.where(valid, top, other),
        tl.where(valid, log_sum, other),
        at_label,
    )


@triton.jit
def _gradient(x, top, scale, here, softcap, CAPPED: tl.constexpr, WIDE: tl.constexpr):
    """Of capped logits: exp(x - top) scale, less `here`, in fp32."""
    grad = _exp(x, top, WIDE) * scale - here
    if CAPPED:
        grad *= 1.0 - (x / softcap) * (x / softcap)
    return grad


@triton.jit
def _backward(
    logits, dlogits, offset, to, label, ignored, top, log_sum, at_label, scale, vocab, softcap, z_loss,
    CAPPED: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, TO_VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the row at `offset` to the one at `to`; of an ignored row nothing is read."""
    active = ignored == 0
    z = tl.where(z_loss == 0.0, 0.0, 2.0 * z_loss * (top + log_sum))
    # an ignored row's logits count as 0, its top and log_sum are 0
    wide = tl.where(active, (1.0 + z) * scale * tl.exp(-log_sum), 0.0)
    first, groups, before = _cut(offset, vocab, VECTOR)
    start = (offset + first) // VECTOR * VECTOR
    to_start = (to + first) // TO_VECTOR * TO_VECTOR
    kind = dlogits.dtype.element_ty
    WIDE: tl.constexpr = kind.primitive_bitwidth > 16
    tl.debug_barrier()  # the label's logit has been read by all
    for tile in range(tl.cdiv(before + groups, GROUPS) - 1, -1, -1):
        group = tile * GROUPS - before + tl.arange(0, GROUPS)
        inside = ((group >= 0) & (group < groups))[:, None]
        columns = _group_columns(group, VECTOR)
        # neither is needed in L2 again: rows that are still to be read a second time are
        x = tl.load(logits + start + columns, mask=inside & active, other=0.0, eviction_policy="evict_first")
        grad = _gradient(_capped(x, softcap, CAPPED), top, wide, 0.0, softcap, CAPPED, WIDE)
        tl.store(dlogits + to_start + columns, grad.to(kind), mask=inside, eviction_policy="evict_first")
    ends = _end_columns(first, groups, VECTOR)
    inside = ends < vocab
    x = tl.load(logits + offset + ends, mask=inside & active, other=0.0)
    grad = _gradient(_capped(x, softcap, CAPPED), top, wide, 0.0, softcap, CAPPED, WIDE)
    tl.store(dlogits + to + ends, grad.to(kind), mask=inside)
    tl.debug_barrier()  # the label's column has been written
    grad = _gradient(at_label, top, wide, scale, softcap, CAPPED, WIDE)
    tl.store(dlogits + to + label, grad.to(kind), mask=active & (label >= 0) & (label < vocab))


@triton.jit
def _fwd(
    logits, labels, loss, lse, stride, vocab, ignore_index, softcap, z_loss,
    CAPPED: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    row_loss, top, log_sum, _ = _forward(
        logits, row * stride, label, label == ignore_index, vocab, softcap, z_loss, CAPPED, GROUPS, VECTOR
    )
    tl.store(loss + row, row_loss)
    tl.store(lse + 2 * row, top)
    tl.store(lse + 2 * row + 1, log_sum)


@triton.jit
def _bwd(
    dloss, logits, labels, lse, dlogits, stride, to_stride, vocab, ignore_index, softcap, z_loss,
    CAPPED: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, TO_VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    ignored = label == ignore_index
    valid = (label >= 0) & (label < vocab) & (ignored == 0)
    at_label = _capped(tl.load(logits + row * stride + label, mask=valid, other=0.0), softcap, CAPPED)
    _backward(
        logits, dlogits, row * stride, row * to_stride, label, ignored,
        tl.load(lse + 2 * row), tl.load(lse + 2 * row + 1), at_label, tl.load(dloss + row),
        vocab, softcap, z_loss, CAPPED, GROUPS, VECTOR, TO_VECTOR,
    )  # fmt: skip


@triton.jit
def _fwd_bwd(
    logits, labels, dloss, loss, stride, vocab, ignore_index, softcap, z_loss,
    CAPPED: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    ignored = label == ignore_index
    row_loss, top, log_sum, at_label = _forward(
        logits, row * stride, label, ignored, vocab, softcap, z_loss, CAPPED, GROUPS, VECTOR
    )
    tl.store(loss + row, row_loss)
    scale = 1.0
    if dloss is not None:
        scale = tl.load(dloss + row)
    _backward(
        logits, logits, row * stride, row * stride, label, ignored, top, log_sum, at_label, scale,
        vocab, softcap, z_loss, CAPPED, GROUPS, VECTOR, VECTOR,
    )  # fmt: skip


def cross_entropy_fwd(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, softcap: float, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (rows), lse (rows, 2)) of logits (rows, vocab)."""
    rows, vocab = logits.shape
    loss = logits.new_empty((rows,), dtype=torch.float32)
    lse = logits.new_empty((rows, 2), dtype=torch.float32)
    if rows:
        with guard(logits):
            _fwd[(rows,)](
                logits, labels, loss, lse, logits.stride(0), vocab, ignore_index, softcap, z_loss,
                **_constants(logits, softcap, most_warps=8),
            )  # fmt: skip
    return loss, lse


def cross_entropy_bwd(
    dloss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor,
    ignore_index: int, softcap: float, z_loss: float,
) -> torch.Tensor:  # fmt: skip
    """The gradient of the logits (rows, vocab)."""
    dlogits = logits.new_empty(logits.shape)
    _run_bwd(dloss, logits, labels, lse, dlogits, ignore_index, softcap, z_loss)
    return dlogits


def cross_entropy_bwd_(
    dloss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor,
    ignore_index: int, softcap: float, z_loss: float,
) -> None:  # fmt: skip
    """In place: the logits become their gradient."""
    _run_bwd(dloss, logits, labels, lse, logits, ignore_index, softcap, z_loss)


def _run_bwd(dloss, logits, labels, lse, dlogits, ignore_index, softcap, z_loss) -> None:
    rows, vocab = logits.shape
    if rows == 0:
        return
    constants = _constants(logits, softcap)
    # groups of the gradient lie on 16 bytes where those of the logits do, if the strides allow it
    alike = (dlogits.stride(0) - logits.stride(0)) % constants["VECTOR"] == 0
    with guard(logits):
        _bwd[(rows,)](
            dloss, logits, labels, lse, dlogits, logits.stride(0), dlogits.stride(0), vocab,
            ignore_index, softcap, z_loss, TO_VECTOR=constants["VECTOR"] if alike else 1, **constants,
        )  # fmt: skip


def cross_entropy_fwd_bwd_(
    logits: torch.Tensor, labels: torch.Tensor, dloss: torch.Tensor | None,
    ignore_index: int, softcap: float, z_loss: float,
) -> torch.Tensor:  # fmt: skip
    """loss (rows); the logits become their gradient, times dloss (rows) where given."""
    rows, vocab = logits.shape
    loss = logits.new_empty((rows,), dtype=torch.float32)
    if rows:
        with guard(logits):
            _fwd_bwd[(rows,)](
                logits, labels, dloss, loss, logits.stride(0), vocab, ignore_index, softcap, z_loss,
                **_constants(logits, softcap),
            )  # fmt: skip
    return loss


def _constants(logits: torch.Tensor, softcap: float, most_warps: int = 32) -> dict[str, int | bool]:
    """A thread takes two groups at a time, four times or more. Wide programs have few rows under way, which L1
    and L2 keep until they are read again; where they are not, several narrow ones hide each other's sums. The
    widest take four groups, if these fill all but a tenth of a row's last tile."""
    vector = 16 // logits.element_size()
    warps = min(most_warps, max(1, triton.next_power_of_2(logits.shape[1]) // 2048))
    groups, tile = triton.cdiv(logits.shape[1], vector), warps * 128
    four = warps == 32 and triton.cdiv(groups, tile) * tile < 1.1 * groups
    return {
        "CAPPED": softcap != 0.0,
        "GROUPS": tile if four else tile // 2,
        "VECTOR": vector,
        "num_warps": warps,
    }
