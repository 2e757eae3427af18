"""SwiGLU's Triton twin: the formulas are in ../swiglu.py. A program takes a piece of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import guard, vector, warps_for

# Columns of a program: forward moves 3 streams, backward 5 or 6, which take more registers.
_FWD_COLUMNS, _BWD_COLUMNS = 2_048, 1_024


@triton.jit
def _piece(INTERMEDIATE: tl.constexpr, COLUMNS: tl.constexpr):
    """(row, columns) of this program: the pieces of a row are neighbours."""
    pieces: tl.constexpr = (INTERMEDIATE + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    return (program // pieces).to(tl.int64), program % pieces * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _fwd(
    gate_up, act, stride, INTERMEDIATE: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    row, columns = _piece(INTERMEDIATE, COLUMNS)
    inside = columns < INTERMEDIATE
    gate_up += row * stride * VECTOR + columns
    g = tl.load(gate_up, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        act + row * INTERMEDIATE + columns, (g * tl.sigmoid(g) * u).to(act.dtype.element_ty), mask=inside
    )


@triton.jit
def _bwd(
    dact, gate_up, dgate_up, act, dact_stride, gate_up_stride, dgate_up_stride,
    INTERMEDIATE: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dgate_up may be gate_up, and act (or None) dact: a program writes what it alone has read before."""
    row, columns = _piece(INTERMEDIATE, COLUMNS)
    inside = columns < INTERMEDIATE
    gate_up += row * gate_up_stride * VECTOR + columns
    dgate_up += row * dgate_up_stride * VECTOR + columns
    dact_columns = row * dact_stride * VECTOR + columns
    g = tl.load(gate_up, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dact + dact_columns, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    kind = dgate_up.dtype.element_ty
    tl.store(dgate_up, (d * u * s * (1.0 + g * (1.0 - s))).to(kind), mask=inside)
    tl.store(dgate_up + INTERMEDIATE, (d * g * s).to(kind), mask=inside)
    if act is not None:
        tl.store(act + dact_columns, (g * s * u).to(kind), mask=inside)


def _launch(kernel, most: int, gate_up: torch.Tensor, *tensors: torch.Tensor | None, strided) -> None:
    rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    if rows == 0 or intermediate == 0:
        return
    columns = min(most, triton.next_power_of_2(intermediate))
    v = vector(*strided)
    with guard(gate_up):
        kernel[(rows * triton.cdiv(intermediate, columns),)](
            *tensors, *(t.stride(0) // v for t in strided),
            INTERMEDIATE=intermediate, COLUMNS=columns, VECTOR=v, num_warps=min(4, 2 * warps_for(columns)),
        )  # fmt: skip


def swiglu_fwd(gate_up: torch.Tensor) -> torch.Tensor:
    """act (rows, intermediate) of gate_up (rows, 2 * intermediate)."""
    act = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
    _launch(_fwd, _FWD_COLUMNS, gate_up, gate_up, act, strided=(gate_up,))
    return act


def swiglu_bwd(dact: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The gradient of gate_up (rows, 2 * intermediate)."""
    dgate_up = gate_up.new_empty(gate_up.shape)
    _run_bwd(dact, gate_up, dgate_up, None)
    return dgate_up


def swiglu_bwd_(dact: torch.Tensor, gate_up: torch.Tensor) -> None:
    """In place: dact becomes act, and gate_up its gradient."""
    _run_bwd(dact, gate_up, gate_up, dact)


def _run_bwd(
    dact: torch.Tensor, gate_up: torch.Tensor, dgate_up: torch.Tensor, act: torch.Tensor | None
) -> None:
    strided = (dact, gate_up, dgate_up)
    _launch(_bwd, _BWD_COLUMNS, gate_up, dact, gate_up, dgate_up, act, strided=strided)
