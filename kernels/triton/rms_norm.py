"""RMSNorm's Triton twin: the formulas are in ../rms_norm.py.

Up to 16,384 columns a program holds whole rows in registers: each input is read once. Wider rows are walked
twice, in pieces; the second pass finds them in L1 or L2. Backward's programs stay on their multiprocessor and
walk over the rows with their part of dweight in registers; a second kernel sums the parts in a fixed order,
so that every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import card, guard, vector, warps_for

_WIDEST = 16_384  # columns held in registers: 16 a thread of 32 warps
_TILE = 2_048  # elements a program takes at a time where rows are short (qk-norm's 64 or 128 columns)

# Of backward's programs on a multiprocessor together: what fits at once with 128 registers a thread.
_RESIDENT_WARPS = 16


@triton.jit
def _load_sum(x, residual, columns, inside):
    """x, or x + residual as a reader of h will see it; fp32."""
    v = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        v = (v + tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        v = v.to(tl.float32)
    return v


@triton.jit
def _reciprocal_root(squares, eps, HIDDEN: tl.constexpr):
    # correctly rounded, as it is once a row
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, HIDDEN * 1.0) + eps))


@triton.jit
def _fwd(
    x, residual, weight, y, h, rstd, rows, x_stride, residual_stride, eps,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    columns = tl.arange(0, COLUMNS)[None, :]  # (1, COLUMNS)
    x += row * x_stride * VECTOR
    if residual is not None:
        residual += row * residual_stride * VECTOR
    inside = (row < rows) & (columns < HIDDEN)
    v = _load_sum(x, residual, columns, inside)
    if residual is not None:
        tl.store(h + row * HIDDEN + columns, v.to(h.dtype.element_ty), mask=inside)
    w = tl.load(weight + columns, mask=columns < HIDDEN, other=0.0).to(tl.float32)
    r = _reciprocal_root(tl.sum(v * v, axis=1, keep_dims=True), eps, HIDDEN)
    tl.store(rstd + row, r, mask=row < rows)
    tl.store(y + row * HIDDEN + columns, (v * r * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _fwd_wide(
    x, residual, weight, y, h, rstd, x_stride, residual_stride, eps,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride * VECTOR
    if residual is not None:
        residual += row * residual_stride * VECTOR
    squares = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, HIDDEN, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        v = _load_sum(x, residual, columns, columns < HIDDEN)
        squares += v * v
    r = _reciprocal_root(tl.sum(squares, axis=0), eps, HIDDEN)
    tl.store(rstd + row, r)
    for begin in range(0, HIDDEN, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        inside = columns < HIDDEN
        v = _load_sum(x, residual, columns, inside)
        if residual is not None:
            tl.store(h + row * HIDDEN + columns, v.to(h.dtype.element_ty), mask=inside)
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * HIDDEN + columns, (v * r * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _bwd(
    dy, dh, h, weight, rstd, dx, parts, rows, dy_stride, dh_stride, h_stride,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)[None, :]  # (1, COLUMNS)
    if dx is not None:
        w = tl.load(weight + columns, mask=columns < HIDDEN, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)  # of dweight
    # 2 stages: the next rows are under way (by cp.async, in shared memory) while these are worked on
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=2):
        rows_here = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        row = rows_here[:, None]  # (ROWS, 1)
        inside = (row < rows) & (columns < HIDDEN)
        d = tl.load(dy + row * dy_stride * VECTOR + columns, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(h + row * h_stride * VECTOR + columns, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + rows_here, mask=rows_here < rows, other=0.0)[:, None]
        normed = v * r
        if parts is not None:
            sums += d * normed
        if dx is not None:
            d *= w
            mean = tl.sum(d * normed, axis=1, keep_dims=True) * (1.0 / HIDDEN)
            if COLUMNS > 8192:
                # 1,024 threads have 64 registers each: rather than spill, they read the row again, from L1.
                # The barrier keeps the compiler from reusing what was read first.
                tl.debug_barrier()
                d = tl.load(dy + row * dy_stride * VECTOR + columns, mask=inside, other=0.0).to(tl.float32)
                v = tl.load(h + row * h_stride * VECTOR + columns, mask=inside, other=0.0).to(tl.float32)
                d, normed = d * w, v * r
            grad = (d - normed * mean) * r
            if dh is not None:
                further = dh + row * dh_stride * VECTOR
                grad += tl.load(further + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + row * HIDDEN + columns, grad.to(dx.dtype.element_ty), mask=inside)
    if parts is not None:
        part = parts + tl.program_id(0) * HIDDEN + columns
        tl.store(part, tl.sum(sums, axis=0, keep_dims=True), mask=columns < HIDDEN)


@triton.jit
def _bwd_wide(
    dy, dh, h, weight, rstd, dx, parts, rows, dy_stride, dh_stride, h_stride,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The part of dweight is in memory here (in L2, that is); `parts` come as zeros."""
    program = tl.program_id(0)
    for i in range(program, rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        dy_row = dy + row * dy_stride * VECTOR
        h_row = h + row * h_stride * VECTOR
        r = tl.load(rstd + row)
        dots = tl.zeros((COLUMNS,), tl.float32)
        for begin in range(0, HIDDEN, COLUMNS):
            columns = begin + tl.arange(0, COLUMNS)
            inside = columns < HIDDEN
            d = tl.load(dy_row + columns, mask=inside, other=0.0).to(tl.float32)
            normed = tl.load(h_row + columns, mask=inside, other=0.0).to(tl.float32) * r
            if parts is not None:
                part = parts + program * HIDDEN + columns
                tl.store(part, tl.load(part, mask=inside) + d * normed, mask=inside)
            if dx is not None:
                dots += d * normed * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if dx is not None:
            mean = tl.sum(dots, axis=0) * (1.0 / HIDDEN)
            for begin in range(0, HIDDEN, COLUMNS):
                columns = begin + tl.arange(0, COLUMNS)
                inside = columns < HIDDEN
                d = tl.load(dy_row + columns, mask=inside, other=0.0).to(tl.float32)
                d *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
                normed = tl.load(h_row + columns, mask=inside, other=0.0).to(tl.float32) * r
                grad = (d - normed * mean) * r
                if dh is not None:
                    further = dh + row * dh_stride * VECTOR
                    grad += tl.load(further + columns, mask=inside, other=0.0).to(tl.float32)
                tl.store(dx + row * HIDDEN + columns, grad.to(dx.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the next row's sums are added to what this one has stored


@triton.jit
def _sum_parts(parts, dweight, count, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, count, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        inside = (row < count) & (columns < HIDDEN)
        sums += tl.load(parts + row * HIDDEN + columns, mask=inside, other=0.0)
    tl.store(dweight + columns, tl.sum(sums, axis=0, keep_dims=True), mask=columns < HIDDEN)


def rms_norm_fwd(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, rstd) of x (rows, hidden); h is empty without a residual."""
    rows, hidden = x.shape
    y = x.new_empty((rows, hidden))
    h = x.new_empty((0, 0) if residual is None else (rows, hidden))
    rstd = x.new_empty((rows,), dtype=torch.float32)
    if y.numel() == 0:
        return y, h, rstd
    v = vector(x, residual)
    strides = (x.stride(0) // v, 0 if residual is None else residual.stride(0) // v)
    constants = {"HIDDEN": hidden, "VECTOR": v}
    with guard(x):
        if hidden > _WIDEST:
            _fwd_wide[(rows,)](
                x, residual, weight, y, h, rstd, *strides, eps,
                COLUMNS=_WIDEST // 2, num_warps=16, **constants,
            )  # fmt: skip
        else:
            height, columns, warps = _tile(hidden)
            _fwd[(triton.cdiv(rows, height),)](
                x, residual, weight, y, h, rstd, rows, *strides, eps,
                ROWS=height, COLUMNS=columns, num_warps=warps, **constants,
            )  # fmt: skip
    return y, h, rstd


def rms_norm_bwd(
    dy: torch.Tensor, dh: torch.Tensor | None, h: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor,
    need_dx: bool, need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, dweight in fp32); what is not needed is empty."""
    rows, hidden = h.shape
    dx = h.new_empty((rows, hidden) if need_dx else (0, 0))
    dweight = h.new_empty((hidden if need_dweight else 0,), dtype=torch.float32)
    if h.numel() == 0 or not (need_dx or need_dweight):
        return dx, dweight.zero_()
    wide = hidden > _WIDEST
    height, columns, warps = (1, _WIDEST // 2, 16) if wide else _tile(hidden)
    tiles = triton.cdiv(rows, height)
    programs = min(tiles, card(h.device)[0] * max(1, _RESIDENT_WARPS // warps)) if need_dweight else tiles
    parts = None
    if need_dweight:
        parts = (torch.zeros if wide else torch.empty)(
            (programs, hidden), dtype=torch.float32, device=h.device
        )
    v = vector(dy, dh, h)
    strides = (dy.stride(0) // v, 0 if dh is None else dh.stride(0) // v, h.stride(0) // v)
    constants = {"HIDDEN": hidden, "COLUMNS": columns, "VECTOR": v, "num_warps": warps}
    if not wide:
        constants["ROWS"] = height
    with guard(h):
        (_bwd_wide if wide else _bwd)[(programs,)](
            dy, dh, h, weight, rstd, dx if need_dx else None, parts, rows, *strides, **constants,
        )  # fmt: skip
        if parts is not None:
            # 32 columns are one 128-byte line
            _sum_parts[(triton.cdiv(hidden, 32),)](
                parts, dweight, programs, HIDDEN=hidden, ROWS=64, COLUMNS=32, num_warps=4
            )
    return dx, dweight


def _tile(hidden: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program that holds whole rows."""
    columns = triton.next_power_of_2(hidden)
    rows = max(1, _TILE // columns)
    return rows, columns, warps_for(rows * columns)
