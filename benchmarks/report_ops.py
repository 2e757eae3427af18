"""The op suite on a GPU, as the README shows it: a table of each op's worst and best shape, and a picture of all ops.

A share of the ceiling is one of the copy rate that the same run measured; linear_cross_entropy's is one of the card's
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.ops import bars

Run = dict[str, Any]

OURS, TWIN = "ours:cuda", "ours:triton"

# implementation, its name, colour, marker, and how far below its line: ours are filled, and apart where they are equal
_DRAWN = (
    ("eager", "PyTorch eager", "0.5", "x", 0),
    ("liger", "Liger", "tab:blue", "s", 0),
    ("quack", "quack", "tab:purple", "^", 0),
    ("compile", "torch.compile", "tab:orange", "D", 0),
    (TWIN, "ours, Triton", "tab:red", "P", 0.16),
    (OURS, "ours, CUDA", "tab:green", "o", -0.16),
)


def copy_rate(run: Run) -> float | None:
    """GB/s, read and written; None for a run that did not measure it."""
    return next((row["rate"] for row in run["rows"] if row["bench"] == "copy"), None)


def table(run: Run) -> str:
    lines = [
        f"| op (copy: {copy_rate(run):,.0f} GB/s) | shape | ours, ms | rate | of copy | Triton, of copy | best peer | its ms | ours is |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(group) for groups in _by_op(run).values() for group in _extremes(groups)]
    return "\n".join(lines)


def _by_op(run: Run) -> dict[str, list[list[bars.Row]]]:
    """The groups of each op that move enough to be held against memory; all where none does."""
    ops: dict[str, list[list[bars.Row]]] = {}
    for group in bars.grouped(run["rows"]):
        if group[0]["bench"] != "copy":
            ops.setdefault(group[0]["bench"], []).append(group)
    return {op: [g for g in groups if bars.is_large(g[0])] or groups for op, groups in ops.items()}


def _extremes(groups: Sequence[list[bars.Row]]) -> list[list[bars.Row]]:
    """The shape with the smallest share of the ceiling, and the one with the largest. One that failed is the worst."""

    def share(group: list[bars.Row]) -> float:
        ours = find(group, OURS) or group[0]
        return ours.get("of_ceiling") or 0.0

    worst, best = min(groups, key=share), max(groups, key=share)
    return [worst] if worst is best else [worst, best]


def find(group: Sequence[bars.Row], impl: str) -> bars.Row | None:
    """The row of `impl`, or the fastest of its kind: eager:hf and eager:F.rms_norm are both eager."""
    found = [row for row in group if row["impl"] == impl or row["impl"].startswith(f"{impl}:")]
    return min(found, key=lambda row: row["ms"] or float("inf"), default=None)


def _line(group: Sequence[bars.Row]) -> str:
    ours = find(group, OURS) or find(group, "ours") or group[0]
    twin, peer = find(group, TWIN), bars.best_peer(group)
    shape = ", ".join(f"{key} {value}" for key, value in ours["shape"].items())
    cells = [ours["bench"], shape]
    if ours["ms"]:
        cells += [f"{ours['ms']:.3f}", f"{ours['rate']:,.0f} {ours['unit']}", _share(ours)]
    else:
        cells += ["failed", "", ""]
    cells.append(_share(twin) if twin else "")
    cells += [peer["impl"], f"{peer['ms']:.3f}"] if peer else ["none", ""]
    cells.append(f"{peer['ms'] / ours['ms']:.2f}x" if peer and ours["ms"] else "")
    return f"| {' | '.join(cells)} |"


def _share(row: bars.Row) -> str:
    if not row["ms"]:
        return "failed"
    if row.get("of_ceiling") is None:
        return "N/A"
    return f"{row['of_ceiling']:.1%}{' of peak' if row['unit'] == 'TFLOP/s' else ''}"


def draw(run: Run) -> Any:
    """A figure: GB/s of each implementation at each op's largest shape, left of the card's copy rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ceiling = copy_rate(run)
    largest = {
        op: max(groups, key=lambda group: group[0]["bytes"])
        for op, groups in _by_op(run).items()
        if bars.is_large(groups[0][0]) and groups[0][0]["unit"] == "GB/s"
    }
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.42 * len(largest)), constrained_layout=True)
    for impl, label, colour, marker, below in _DRAWN:
        rows = [find(group, impl) for group in largest.values()]
        points = [(row["rate"], y + below) for y, row in enumerate(rows) if row and row["rate"]]
        if points:
            axes.plot(
                *zip(*points),
                marker,
                label=label,
                color=colour,
                markersize=8 if impl.startswith("ours") else 6,
                markerfacecolor=colour if impl.startswith("ours") else "none",
                clip_on=False,
                zorder=3,
            )
    axes.axvline(ceiling, color="k", lw=1, ls="--", label=f"copy, {ceiling:,.0f} GB/s")
    axes.set_yticks(range(len(largest)), [f"{op}\n{_small(group[0])}" for op, group in largest.items()])
    axes.tick_params(axis="y", labelsize=8)
    axes.set(xlim=(0, ceiling * 1.08), ylim=(len(largest) - 0.5, -0.5))
    axes.set_xlabel("GB/s of the bytes that an ideal kernel moves")
    axes.set_title(run["device"], fontsize=10)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _small(row: bars.Row) -> str:
    """The shape's values alone, or the model whose tensors it has."""
    if "preset" in row["shape"]:
        return f"tensors of {row['shape']['preset']}"
    return " x ".join(
        f"{value:,}" if isinstance(value, int) else str(value) for value in row["shape"].values()
    )
