"""RMSNorm's Triton twin: the formulas are in ../rms_norm.py.

Up to 16,384 columns a program holds whole rows in registers: each input is read once. Where padding a row to
a power of two would leave many lanes idle (5120 columns on 8192) it is two tiles, `main` and `rest`. Wider
rows are walked twice, in pieces; the second pass finds them in L1 or L2. Backward's programs stay on their
multiprocessor and walk over the rows with their part of dweight in registers; a second kernel sums the parts
in a fixed order, so that every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import guard, processors, vector, warps_for

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
def _load_weight(weight, columns, HIDDEN: tl.constexpr):
    return tl.load(weight + columns, mask=columns < HIDDEN, other=0.0).to(tl.float32)


@triton.jit
def _by_thread(v, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """(1, THREADS) sums of (1, columns), each of what one thread has read, `VECTOR` elements at a time."""
    run: tl.constexpr = min(VECTOR, v.shape[1] // THREADS)
    v = tl.reshape(v, (1, v.shape[1] // (THREADS * run), THREADS, run))
    return tl.sum(tl.sum(v, axis=3), axis=1)


@triton.jit
def _row_sum(main, rest, VECTOR: tl.constexpr):
    """(rows, 1) sums. Two tiles are added thread by thread first: threads wait for each other once a row."""
    if rest is not None:
        THREADS: tl.constexpr = max(main.shape[1], 4 * rest.shape[1]) // 16  # as in _tile
        main = _by_thread(main, THREADS, VECTOR) + _by_thread(rest, THREADS, VECTOR)
    return tl.sum(main, axis=1, keep_dims=True)


@triton.jit
def _reciprocal_root(squares, eps, HIDDEN: tl.constexpr):
    # correctly rounded, as it is once a row
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, HIDDEN * 1.0) + eps))


@triton.jit
def _store_normed(y, h, v, r, w, at, inside):
    if h is not None:
        tl.store(h + at, v.to(h.dtype.element_ty), mask=inside)
    tl.store(y + at, (v * r * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _fwd(
    x, residual, weight, y, h, rstd, rows, x_stride, residual_stride, eps,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    x += row * x_stride * VECTOR
    if residual is not None:
        residual += row * residual_stride * VECTOR
    main = tl.arange(0, MAIN)[None, :]  # (1, MAIN)
    inside = (row < rows) & (main < HIDDEN)
    v = _load_sum(x, residual, main, inside)
    rest_squares = None
    if REST:
        rest = MAIN + tl.arange(0, REST)[None, :]  # (1, REST)
        rest_inside = (row < rows) & (rest < HIDDEN)
        rest_v = _load_sum(x, residual, rest, rest_inside)
        rest_w = _load_weight(weight, rest, HIDDEN)
        rest_squares = rest_v * rest_v
    w = _load_weight(weight, main, HIDDEN)
    r = _reciprocal_root(_row_sum(v * v, rest_squares, VECTOR), eps, HIDDEN)
    tl.store(rstd + row, r, mask=row < rows)
    _store_normed(y, h, v, r, w, row * HIDDEN + main, inside)
    if REST:
        _store_normed(y, h, rest_v, r, rest_w, row * HIDDEN + rest, rest_inside)


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
def _load_two(dy, h, columns, inside):
    d = tl.load(dy + columns, mask=inside, other=0.0).to(tl.float32)
    return d, tl.load(h + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _terms(d, v, r, w, sums):
    normed = v * r
    return d * w, normed, sums + d * normed


@triton.jit
def _store_dx(dx, dh, d, normed, mean, r, columns, inside):
    grad = (d - normed * mean) * r
    if dh is not None:
        grad += tl.load(dh + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + columns, grad.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _store_part(part, sums, columns, HIDDEN: tl.constexpr):
    tl.store(part + columns, tl.sum(sums, axis=0, keep_dims=True), mask=columns < HIDDEN)


@triton.jit
def _bwd(
    dy, dh, h, weight, rstd, dx, parts, rows, dy_stride, dh_stride, h_stride,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    main = tl.arange(0, MAIN)[None, :]  # (1, MAIN)
    w = _load_weight(weight, main, HIDDEN)
    sums = tl.zeros((ROWS, MAIN), tl.float32)  # of dweight
    if REST:
        rest = MAIN + tl.arange(0, REST)[None, :]  # (1, REST)
        rest_w = _load_weight(weight, rest, HIDDEN)
        rest_sums = tl.zeros((ROWS, REST), tl.float32)
    # the next rows are under way (by cp.async, in shared memory) while these are worked on
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows_here = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        row = rows_here[:, None]  # (ROWS, 1)
        dy_row = dy + row * dy_stride * VECTOR
        h_row = h + row * h_stride * VECTOR
        inside = (row < rows) & (main < HIDDEN)
        d, v = _load_two(dy_row, h_row, main, inside)
        if REST:
            rest_inside = (row < rows) & (rest < HIDDEN)
            rest_d, rest_v = _load_two(dy_row, h_row, rest, rest_inside)
        r = tl.load(rstd + rows_here, mask=rows_here < rows, other=0.0)[:, None]
        d, normed, sums = _terms(d, v, r, w, sums)
        rest_dots = None
        if REST:
            rest_d, rest_normed, rest_sums = _terms(rest_d, rest_v, r, rest_w, rest_sums)
            rest_dots = rest_d * rest_normed
        if dx is not None:
            mean = _row_sum(d * normed, rest_dots, VECTOR) * (1.0 / HIDDEN)
            if MAIN + REST > 8192:
                # 1,024 threads have 64 registers each: rather than spill, they read the row again, from L1.
                # The barrier keeps the compiler from reusing what was read first (and from reading ahead into
                # shared memory, where sm_89 lacks room for more than 8,192 columns of fp32).
                tl.debug_barrier()
                d, v = _load_two(dy_row, h_row, main, inside)
                d, normed = d * w, v * r
                if REST:
                    rest_d, rest_v = _load_two(dy_row, h_row, rest, rest_inside)
                    rest_d, rest_normed = rest_d * rest_w, rest_v * r
            dx_row = dx + row * HIDDEN
            dh_row = None
            if dh is not None:
                dh_row = dh + row * dh_stride * VECTOR
            _store_dx(dx_row, dh_row, d, normed, mean, r, main, inside)
            if REST:
                _store_dx(dx_row, dh_row, rest_d, rest_normed, mean, r, rest, rest_inside)
    if parts is not None:
        part = parts + tl.program_id(0) * HIDDEN
        _store_part(part, sums, main, HIDDEN)
        if REST:
            _store_part(part, rest_sums, rest, HIDDEN)


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
            tile = _tile(hidden)
            _fwd[(triton.cdiv(rows, tile["ROWS"]),)](
                x, residual, weight, y, None if residual is None else h, rstd, rows, *strides, eps,
                **constants, **tile,
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
    tile = {"COLUMNS": _WIDEST // 2, "num_warps": 16} if wide else _tile(hidden)
    if not wide:
        # two further rows under way measured much better than one; an sm_89 has 99 KiB for them
        row_bytes = tile["ROWS"] * (tile["MAIN"] + tile["REST"]) * h.element_size()
        tile["STAGES"] = 3 if row_bytes <= 16 * 1024 else 2
    programs = triton.cdiv(rows, tile.get("ROWS", 1))
    if need_dweight:
        programs = min(programs, processors(h.device) * max(1, _RESIDENT_WARPS // tile["num_warps"]))
    parts = None
    if need_dweight:
        parts = (torch.zeros if wide else torch.empty)(
            (programs, hidden), dtype=torch.float32, device=h.device
        )
    v = vector(dy, dh, h)
    strides = (dy.stride(0) // v, 0 if dh is None else dh.stride(0) // v, h.stride(0) // v)
    with guard(h):
        (_bwd_wide if wide else _bwd)[(programs,)](
            dy, dh, h, weight, rstd, dx if need_dx else None, parts, rows, *strides,
            HIDDEN=hidden, VECTOR=v, **tile,
        )  # fmt: skip
        if parts is not None:
            # 32 columns are one 128-byte line
            _sum_parts[(triton.cdiv(hidden, 32),)](
                parts, dweight, programs, HIDDEN=hidden, ROWS=64, COLUMNS=32, num_warps=4
            )
    return dx, dweight


def _tile(hidden: int) -> dict[str, int]:
    """How a program holds whole rows: padded to a power of two, or, where less is enough, a row as half that
    power and a smaller power for the rest (5120 is 4096 and 1024)."""
    main, rest = triton.next_power_of_2(hidden), 0
    rows = max(1, _TILE // main)
    half = main // 2
    if half >= 512:  # a warp's; shorter rows share a program
        least = half // 16  # a column for each thread
        left = max(least, triton.next_power_of_2(hidden - half))
        if left < half:
            rows, main, rest = 1, half, left
    # up to a quarter more is 20 elements a thread; half as much again is 12 each of twice the threads
    warps = warps_for(rows * max(main, 4 * rest))
    return {"ROWS": rows, "MAIN": main, "REST": rest, "num_warps": warps}
