"""The training step in pictures: how fast each side is, and where a step's time goes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from benchmarks import cost
from benchmarks.report_training import Row, Run, best_peer, is_ours, ordered

MOST, MOST_BARS = 8, 24  # runs, and bars of parts: more can't be read at a README's width


def speed(runs: Iterable[Run]) -> Any:
    """A figure: a panel a run, a bar a side, in tokens/s/GPU over the best peer's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = ordered(runs)[:MOST]
    across = min(2, len(shown))
    lines = [shown[i : i + across] for i in range(0, len(shown), across)]
    heights = [1 + max(len(cost.timed(run)) for run in line) for line in lines]
    figure, grid = plt.subplots(
        len(lines),
        across,
        figsize=(5.5 * across, 0.6 + 0.26 * sum(heights)),
        height_ratios=heights,
        constrained_layout=True,
        squeeze=False,
    )
    figure.get_layout_engine().set(wspace=0.05, hspace=0.03)
    for axes, run in zip(grid.flat, shown):
        _bars(axes, run)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    figure.supxlabel("tokens/s/GPU over the best peer's (fp8 ones aside), which is 1", fontsize=9)
    return figure


def _bars(axes: Any, run: Run) -> None:
    rows = sorted(cost.timed(run), key=lambda row: -row["rate"])
    best = best_peer(rows) or rows[0]
    values = [row["rate"] / best["rate"] for row in rows]
    axes.barh([row["impl"] for row in rows], values, color=[_colour(row, best) for row in rows])
    axes.axvline(1, color="k", lw=0.8, ls="--")
    axes.set(xlim=(0, max(values) * 1.5), xticks=[])
    for line, (row, value) in enumerate(zip(rows, values)):
        weight = "bold" if row["impl"] == "ours" else "normal"
        text = f"{row['rate']:,.0f}   {value:.2f}x"  # in a column of their own, right of bars and line
        axes.text(max(values) * 1.5, line, text, ha="right", va="center", fontsize=8, weight=weight)
    axes.set_title(short_title(run), fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.invert_yaxis()


def _colour(row: Row, best: Row) -> str:
    if is_ours(row):
        return "tab:green" if row["impl"] == "ours" else "lightgreen"
    if "fp8" in row["impl"]:
        return "tab:orange"
    return "dimgray" if row is best else "silver"


def short_title(run: Run) -> str:
    shape = run["rows"][0]["shape"]
    return f"{shape['preset']}, {shape['batch']} x {shape['seq']}, {short_device(run['device'])}"


def short_device(name: str) -> str:
    return re.sub(r"\s+(80GB|HBM3|with.*)|^NVIDIA ", "", name)


def has_parts(runs: Iterable[Run]) -> bool:
    return any(row.get("parts") for run in runs for row in run["rows"])


def parts(runs: Iterable[Run]) -> Any:
    """A figure: where the time of a step goes, a stacked bar for each side that says so, as wide as its share of the step
    of the slowest side of its run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(run, row) for run in ordered(runs) for row in run["rows"] if row.get("parts")][:MOST_BARS]
    names = list(dict.fromkeys(name for _, row in bars for name in row["parts"]))
    steps = [sum(row["parts"].values()) for _, row in bars]
    slowest = [max(s for s, (other, _) in zip(steps, bars) if other is run) for run, _ in bars]
    runs_before = [len({id(run) for run, _ in bars[: i + 1]}) - 1 for i in range(len(bars))]
    places = [i + 0.5 * n for i, n in enumerate(runs_before)]  # a gap before each run
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.32 * places[-1]), constrained_layout=True)
    left = [0.0] * len(bars)
    for index, name in enumerate(names):
        ms = [row["parts"].get(name, 0.0) for _, row in bars]
        shares = [m / s for m, s in zip(ms, slowest)]
        drawn = axes.barh(places, shares, left=left, label=name, color=plt.cm.tab20(index % 20))
        texts = [
            f"{m:,.0f}" if share > 0.05 else "" for m, share in zip(ms, shares)
        ]  # where there is room for it
        axes.bar_label(drawn, texts, label_type="center", fontsize=8)
        left = [a + b for a, b in zip(left, shares)]
    axes.set_yticks(places, [f"{short_title(run)}: {row['impl']}" for run, row in bars], fontsize=8)
    axes.set(ylim=(places[-1] + 0.6, -0.6), xticks=[])
    for place, end, step in zip(places, left, steps):
        axes.text(end + 0.01, place, f"{step:,.0f} ms", va="center", fontsize=8)
    axes.set_xlabel(
        "ms of an optimizer step; each shape's slowest side is as wide as the picture", fontsize=9
    )
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(6, len(names)), frameon=False, fontsize=8)
    return figure
