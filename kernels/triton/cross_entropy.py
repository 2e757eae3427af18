"""Cross-entropy's Triton twin: the formulas are in ../cross_entropy.py and csrc/ops.h.

A program takes a row. Rows of an odd vocabulary start anywhere, so a row is cut into whole groups of 16
bytes, each read with one access, and its two ends, read one by one. Forward keeps a running maximum and a sum
for each group's place in the tile, not for each element: one exponential an element and one a group. The
forward that also writes the gradient reads a row twice, and has only as many rows under way as L2 keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import card, guard, warps_for

# Of a program that reads a row once: several are on a multiprocessor, and hide each other's waiting.
_STREAM_WARPS = 8
# Of a multiprocessor's programs that read a row twice: what fits with 64 registers a thread. They are too few
# to hide each other's waiting, so that their loads are issued STAGES - 1 tiles ahead.
_RESIDENT_WARPS = 32


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
    """(columns before the first whole group, number of whole groups) of a row that starts at `offset`."""
    first = tl.minimum(((VECTOR - offset % VECTOR) % VECTOR).to(tl.int32), vocab)
    return first, (vocab - first) // VECTOR


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
def _forward(
    logits, offset, label, ignored, vocab, softcap, z_loss,
    CAPPED: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(loss, top, log_sum) of the row at `offset`; 0 where it is ignored, NaN for an impossible label."""
    valid = (label >= 0) & (label < vocab) & (ignored == 0)
    # nothing is read of a row without a label
    first, groups = _cut(offset, tl.where(valid, vocab, 0), VECTOR)
    # a multiple of VECTOR: so Triton knows it
    start = logits + (offset + first) // VECTOR * VECTOR
    tops = tl.full((GROUPS,), float("-inf"), tl.float32)
    sums = tl.zeros((GROUPS,), tl.float32)
    for begin in tl.range(0, groups, GROUPS, num_stages=STAGES):
        group = begin + tl.arange(0, GROUPS)
        inside = (group < groups)[:, None]
        x = _capped(tl.load(start + _group_columns(group, VECTOR), mask=inside, other=0.0), softcap, CAPPED)
        x = tl.where(inside, x, float("-inf"))
        new = tl.maximum(tops, tl.max(x, axis=1))
        above = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
        sums = sums * tl.exp(tops - above) + tl.sum(tl.exp(x - above[:, None]), axis=1)
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
    return tl.where(valid, loss, other), tl.where(valid, top, other), tl.where(valid, log_sum, other)


@triton.jit
def _gradient(logits, columns, label, active, top, log_sum, z, scale, softcap, CAPPED: tl.constexpr):
    x = _capped(logits, softcap, CAPPED)
    p = tl.exp((x - top) - log_sum)
    grad = ((p - tl.where(columns == label, 1.0, 0.0)) + z * p) * scale
    if CAPPED:
        grad *= 1.0 - (x / softcap) * (x / softcap)
    return tl.where(active, grad, 0.0).to(logits.dtype)


@triton.jit
def _backward(
    logits, dlogits, offset, to, label, ignored, top, log_sum, scale, vocab, softcap, z_loss,
    CAPPED: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, TO_VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the row at `offset` to the one at `to`; of an ignored row nothing is read."""
    active = ignored == 0
    z = tl.where(z_loss == 0.0, 0.0, 2.0 * z_loss * (top + log_sum))
    first, groups = _cut(offset, vocab, VECTOR)
    start = (offset + first) // VECTOR * VECTOR
    to_start = (to + first) // TO_VECTOR * TO_VECTOR
    for begin in tl.range(0, groups, GROUPS, num_stages=STAGES):
        group = begin + tl.arange(0, GROUPS)
        inside = (group < groups)[:, None]
        columns = _group_columns(group, VECTOR)
        # neither is needed in L2 again: rows that are still to be read a second time are
        x = tl.load(logits + start + columns, mask=inside & active, other=0.0, eviction_policy="evict_first")
        grad = _gradient(x, first + columns, label, active, top, log_sum, z, scale, softcap, CAPPED)
        tl.store(dlogits + to_start + columns, grad, mask=inside, eviction_policy="evict_first")
    ends = _end_columns(first, groups, VECTOR)
    inside = ends < vocab
    x = tl.load(logits + offset + ends, mask=inside & active, other=0.0)
    grad = _gradient(x, ends, label, active, top, log_sum, z, scale, softcap, CAPPED)
    tl.store(dlogits + to + ends, grad, mask=inside)


@triton.jit
def _fwd(
    logits, labels, loss, lse, stride, vocab, ignore_index, softcap, z_loss,
    CAPPED: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    ignored = label == ignore_index
    row_loss, top, log_sum = _forward(
        logits, row * stride, label, ignored, vocab, softcap, z_loss, CAPPED, GROUPS, VECTOR, STAGES
    )
    tl.store(loss + row, row_loss)
    tl.store(lse + 2 * row, top)
    tl.store(lse + 2 * row + 1, log_sum)


@triton.jit
def _bwd(
    dloss, logits, labels, lse, dlogits, stride, to_stride, vocab, ignore_index, softcap, z_loss,
    CAPPED: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, TO_VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    _backward(
        logits, dlogits, row * stride, row * to_stride, label, label == ignore_index,
        tl.load(lse + 2 * row), tl.load(lse + 2 * row + 1), tl.load(dloss + row),
        vocab, softcap, z_loss, CAPPED, GROUPS, VECTOR, TO_VECTOR, STAGES,
    )  # fmt: skip


@triton.jit
def _fwd_bwd(
    logits, labels, dloss, loss, rows, stride, vocab, ignore_index, softcap, z_loss,
    CAPPED: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        label = tl.load(labels + row)
        ignored = label == ignore_index
        row_loss, top, log_sum = _forward(
            logits, row * stride, label, ignored, vocab, softcap, z_loss, CAPPED, GROUPS, VECTOR, STAGES
        )
        tl.store(loss + row, row_loss)
        scale = 1.0
        if dloss is not None:
            scale = tl.load(dloss + row)
        tl.debug_barrier()  # the label's logit has been read by all
        _backward(
            logits, logits, row * stride, row * stride, label, ignored, top, log_sum, scale,
            vocab, softcap, z_loss, CAPPED, GROUPS, VECTOR, VECTOR, STAGES,
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
                STAGES=1, **_constants(logits, softcap, _STREAM_WARPS),
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
    constants = _constants(logits, softcap, _STREAM_WARPS)
    # groups of the gradient lie on 16 bytes where those of the logits do, if the strides allow it
    alike = (dlogits.stride(0) - logits.stride(0)) % constants["VECTOR"] == 0
    with guard(logits):
        _bwd[(rows,)](
            dloss, logits, labels, lse, dlogits, logits.stride(0), dlogits.stride(0), vocab,
            ignore_index, softcap, z_loss, TO_VECTOR=constants["VECTOR"] if alike else 1,
            STAGES=1, **constants,
        )  # fmt: skip


def cross_entropy_fwd_bwd_(
    logits: torch.Tensor, labels: torch.Tensor, dloss: torch.Tensor | None,
    ignore_index: int, softcap: float, z_loss: float,
) -> torch.Tensor:  # fmt: skip
    """loss (rows); the logits become their gradient, times dloss (rows) where given."""
    rows, vocab = logits.shape
    loss = logits.new_empty((rows,), dtype=torch.float32)
    if rows == 0:
        return loss
    # Rows under way at once fill at most half of L2, or the second read of a row would come from memory; but
    # at least half of the multiprocessors have one, or memory idles. So few rows need wide programs.
    processors, l2 = card(logits.device)
    fitting = max(processors // 2, l2 // 2 // (vocab * logits.element_size()))
    constants = _constants(logits, softcap, triton.next_power_of_2(max(8, 32 * processors // fitting)))
    programs = min(rows, fitting, processors * _RESIDENT_WARPS // constants["num_warps"])
    with guard(logits):
        _fwd_bwd[(programs,)](
            logits, labels, dloss, loss, rows, logits.stride(0), vocab, ignore_index, softcap, z_loss,
            STAGES=3, **constants,
        )  # fmt: skip
    return loss


def _constants(logits: torch.Tensor, softcap: float, most_warps: int) -> dict[str, int | bool]:
    """A thread takes two groups at a time."""
    warps = min(32, most_warps, warps_for(logits.shape[1]))
    constants = {"GROUPS": warps * 64, "VECTOR": 16 // logits.element_size()}
    return {"CAPPED": softcap != 0.0, "num_warps": warps, **constants}
