"""What a GPU's rows are held against, and their table.

An op that only moves memory should take as long as its bytes take: BARS gives the share of the card's copy rate that ours must
reach. Shares count where at least LARGE bytes move; fewer sit in the L2 cache, and there ours must not be slower than the
fastest peer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

BARS = {
    "rms_norm_fwd": 0.90,
    "rms_norm_residual_fwd": 0.90,
    "rms_norm_bwd": 0.85,
    "rms_norm_residual_bwd": 0.85,
    "rotary": 0.90,
    "swiglu": 0.95,
    "cross_entropy": 0.85,
    "adamw": 0.90,
}
LARGE = 200e6
NOISE = 1.02  # two runs of one kernel differ by so much

COLUMNS = ("ours:cuda", "ours:triton", "ours:reference", "eager", "compile", "liger", "quack")


def is_large(row: Row) -> bool:
    """Whether it moves enough to be held against memory; true of what is counted in operations."""
    return row.get("bytes", LARGE) >= LARGE


def share(bench: str) -> float | None:
    """The share of the copy rate that `bench` must reach; None: it has only its peers to beat."""
    return next((bar for name, bar in BARS.items() if bench.startswith(name)), None)


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by benchmark and shape, in the order in which they first appear."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["bench"], json.dumps(row["shape"])), []).append(row)
    return list(groups.values())


def is_ours(row: Row) -> bool:
    return row["impl"].startswith("ours")


def best_peer(group: Sequence[Row]) -> Row | None:
    timed = [row for row in group if not is_ours(row) and row["ms"]]
    return min(timed, key=lambda row: row["ms"]) if timed else None


def bar(group: Sequence[Row]) -> str:
    """The bar of one benchmark and shape, in words."""
    wanted = share(group[0]["bench"])
    if wanted is not None and is_large(group[0]):
        return f"{wanted:.0%}"
    peer = best_peer(group)
    return peer["impl"] if peer else "none"


def misses(row: Row, group: Sequence[Row]) -> bool:
    """Whether a row of ours, one of the group, is under the group's bar. One that failed is."""
    if not row["ms"]:
        return True
    wanted, peer = share(row["bench"]), best_peer(group)
    if wanted is not None and is_large(row):
        return row["of_ceiling"] < wanted
    return peer is not None and row["ms"] > peer["ms"] * NOISE


def missed(rows: Sequence[Row]) -> list[Row]:
    return [row for group in grouped(rows) for row in group if is_ours(row) and misses(row, group)]


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each benchmark and shape; a cell is ms, GB/s (or TFLOP/s), share of the ceiling; `!` is under the bar."""
    lines = [f"{'op':24} {'shape':46} " + " ".join(f"{name:21}" for name in COLUMNS) + " bar"]
    for group in grouped(rows):
        if group[0]["bench"] == "copy":
            lines.append(f"copy: {group[0]['rate']:,.0f} GB/s, read and written")
            continue
        shape = _shape(group[0])
        cells = " ".join(f"{_cell(column, group):21}" for column in COLUMNS)
        lines.append(f"{group[0]['bench']:24} {shape:46} {cells} {bar(group)}")
    lines += [
        f"{row['bench']} {_shape(row)} {row['impl']}: {row['error']}"
        for row in rows
        if row.get("error", "not installed") != "not installed"
    ]
    under = missed(rows)
    return [
        *lines,
        f"{len(under)} under their bar",
        *(f"    {row['bench']} {_shape(row)} {row['impl']}" for row in under),
    ]


def _shape(row: Row) -> str:
    return " ".join(f"{key}={value}" for key, value in row["shape"].items())


def _column(impl: str) -> str:
    """ours:torch, where an op has no kernel of ours yet, stands where the CUDA kernel will."""
    if impl.startswith("ours"):
        return impl if impl in COLUMNS else COLUMNS[0]
    return impl.partition(":")[0]


def _cell(column: str, group: Sequence[Row]) -> str:
    """The fastest of the column's implementations: eager:hf and eager:F.rms_norm are both eager."""
    found = [row for row in group if _column(row["impl"]) == column]
    if not found:
        return "-"
    timed = [row for row in found if row["ms"]]
    if not timed:
        return found[0]["error"] if found[0]["error"] == "not installed" else "error"
    row = min(timed, key=lambda row: row["ms"])
    of = "" if row["of_ceiling"] is None else f" {row['of_ceiling']:.1%}"
    return f"{row['ms']:.4f} {row['rate']:,.0f}{of}{'!' if is_ours(row) and misses(row, group) else ''}"
