"""The Triton twin of the embedding's gradient, ../embedding.py: tokens come sorted by id, and a program adds
up those of one id."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import guard, vector, warps_for

_COLUMNS = 1_024
_AHEAD = 8  # rows loaded before the first is needed


@triton.jit
def _bwd(
    dweight, dy, ids, order, tokens, vocab, dy_stride, dweight_stride,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A program takes some columns of the run of equal ids that starts at its token; where none starts, it
    has nothing to do. The rows are added in their order, so that two calls give the same bits."""
    pieces: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // pieces).to(tl.int64)
    id = tl.load(ids + token)
    before = tl.load(ids + token - 1, mask=token > 0, other=-1)
    if (id != before) & (id >= 0) & (id < vocab):
        columns = tl.program_id(0) % pieces * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < HIDDEN
        sums = tl.zeros((COLUMNS,), tl.float32)
        same = token < tokens
        while same:
            for i in tl.static_range(AHEAD):
                at = token + i
                same = tl.load(ids + at, mask=at < tokens, other=-1) == id
                row = tl.load(order + at, mask=same, other=0)
                grad = tl.load(dy + row * dy_stride * VECTOR + columns, mask=inside & same, other=0.0)
                sums += grad.to(tl.float32)
            token += AHEAD
        to = dweight + id * dweight_stride * VECTOR + columns
        sums += tl.load(to, mask=inside).to(tl.float32)
        tl.store(to, sums.to(dweight.dtype.element_ty), mask=inside)


def embedding_bwd_(dweight: torch.Tensor, dy: torch.Tensor, ids: torch.Tensor, order: torch.Tensor) -> None:
    """Adds to row id of dweight (vocab, hidden) the sum of dy (tokens, hidden) over the tokens of that id.
    ids (tokens) are sorted, order (tokens) tells whose each is; ids outside the vocabulary are left out."""
    tokens, hidden = dy.shape
    if tokens == 0 or hidden == 0:
        return
    columns = min(_COLUMNS, triton.next_power_of_2(hidden))
    v = vector(dy, dweight)
    with guard(dy):
        _bwd[(tokens * triton.cdiv(hidden, columns),)](
            dweight, dy, ids, order, tokens, dweight.shape[0], dy.stride(0) // v, dweight.stride(0) // v,
            HIDDEN=hidden, COLUMNS=columns, VECTOR=v, AHEAD=_AHEAD, num_warps=min(4, 2 * warps_for(columns)),
        )  # fmt: skip
