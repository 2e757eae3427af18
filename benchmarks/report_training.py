"""The training step as the README shows it: tables of runs beside their peers, ladder, sizes, cost.

A run is a file of benchmarks/results/, a side one of its rows. The best peer is the fastest that computes as ours does:
one in fp8 is shown, but is not the same arithmetic. Files from before a column was stored leave its cells empty.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import cost
from openllama.model import parameter_count
from openllama.presets import PRESETS, preset

Run = dict[str, Any]
Row = dict[str, Any]

NOTHING = "nothing stored yet"
# parameters from which ours stands beside what others published, whose models have 6 billion and more
COMPARABLE = 1e9


def is_ours(row: Row) -> bool:
    return row["impl"].partition(":")[0] == "ours"


def on_cpu(run: Run) -> bool:
    return re.search(r", \d+ threads$", run["device"]) is not None


def ordered(runs: Iterable[Run]) -> list[Run]:
    """Newest first, of one day the 7b, which the project is about, before larger and smaller models; CPUs last."""

    def key(run: Run) -> tuple[Any, ...]:
        shape = run["rows"][0]["shape"]
        day = datetime.date.fromisoformat(run["date"]).toordinal()
        size = [*PRESETS].index(shape["preset"]) if shape["preset"] in PRESETS else 0
        return on_cpu(run), -day, shape["preset"] != "7b", -size, shape["seq"], shape["batch"]

    return sorted(runs, key=key)


def best_peer(rows: Iterable[Row]) -> Row | None:
    peers = [row for row in rows if row["rate"] and not is_ours(row) and "fp8" not in row["impl"]]
    return max(peers, key=lambda row: row["rate"], default=None)


def dtype(run: Run) -> str:
    """What it was computed in; a side that did not run has none."""
    return next((row["dtype"] for row in run["rows"] if row["dtype"]), "no side ran")


def title(run: Run) -> str:
    first = next((row for row in run["rows"] if row["impl"] == "ours"), run["rows"][0])
    shape = {key: value for key, value in first["shape"].items() if key != "preset"}
    words = [f"{key} {value}" for key, value in shape.items()]
    return ", ".join([first["shape"]["preset"], *words, dtype(run), run["device"]])


def table(run: Run) -> str:
    """A line for each side, the best peer's bold; what was not installed in one line, what failed with its reason."""
    best = best_peer(run["rows"])
    lines = [
        f"**{title(run)}**\n",
        "| | optimizer | tokens/s/GPU | model TFLOP/s | MFU | peak GiB | ours is |",
        "|---|---|---|---|---|---|---|",
    ]
    missing = [row["impl"] for row in run["rows"] if row.get("error") == "not installed"]
    for row in run["rows"]:
        if row["impl"] in missing:
            continue
        ratio = f"{row['ratio']:.2f}x" if row.get("ratio") and row["impl"] != "ours" else ""
        cells = [row["impl"], row.get("optimizer") or "", *_speed(row), ratio]
        lines.append(_line(cells, bold=row is best))
    if settings := next((row.get("settings") for row in run["rows"] if row["impl"] == "ours"), None):
        lines.append(f"\nours with {settings}")
    if missing:
        lines.append(f"\nnot installed: {', '.join(missing)}")
    return "\n".join(lines)


def _speed(row: Row) -> list[str]:
    """Cells of tokens/s/GPU, model TFLOP/s, MFU and peak GiB; of a side that did not run the reason."""
    if not row["rate"]:
        return [_short(row.get("error") or "failed"), "", "", ""]
    mfu = f"{row['of_ceiling']:.1%}" if row.get("of_ceiling") else "N/A"
    flops, peak = row.get("model_tflops"), row.get("peak_gib")
    return [f"{row['rate']:,.0f}", f"{flops:.3g}" if flops else "", mfu, f"{peak:.1f}" if peak else ""]


def _short(error: str) -> str:
    text = " ".join(error.split()).replace("|", "\\|")
    return text if len(text) <= 80 else f"{text[:77]}..."


def _line(cells: Iterable[str], bold: bool = False) -> str:
    return f"| {' | '.join(f'**{cell}**' if bold and cell else cell for cell in cells)} |"


def answer(run: Run) -> str:
    """How far from fp32 a run in low precision ends up, HuggingFace's and ours."""
    first = run["rows"][0]
    lines = [
        f"**{title(run)}**\n",
        "| beside HuggingFace in fp32 | loss apart, most, nats | mean | gradients apart, most | median |",
        "|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        cells = [
            f"{row[key]:.4f}" for key in ("loss_gap_max", "loss_gap_mean", "grad_gap_max", "grad_gap_median")
        ]
        lines.append(_line([f"{row['impl']} in {first['dtype']}", *cells]))
    return "\n".join(lines)


def ladder(run: Run) -> str:
    """Rungs in the order they were climbed, each over the last one before it that ran, and over the first."""
    lines = [
        f"**{title(run)}**\n",
        "| rung | tokens/s/GPU | model TFLOP/s | MFU | peak GiB | over the rung before | over the first |",
        "|---|---|---|---|---|---|---|",
    ]
    rates: list[float] = []
    for row in run["rows"]:
        over = (
            [f"{row['rate'] / rates[-1]:.2f}x", f"{row['rate'] / rates[0]:.2f}x"]
            if row["rate"] and rates
            else ["", ""]
        )
        lines.append(_line([row["impl"], *_speed(row), *over]))
        rates += [row["rate"]] if row["rate"] else []
    return "\n".join(lines)


def sizes(run: Run) -> str:
    """Models of several sizes; one cut to the layers that fit says so, and is counted as what was timed."""
    lines = [
        f"**{dtype(run)}, {run['device']}**\n",
        "| model | side | tokens/s/GPU | model TFLOP/s | MFU | peak GiB | tokens/s x B |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        shape = row["shape"]
        cut = (
            f", {shape['layers']} of its {preset(shape['preset']).layers} layers"
            if shape.get("layers")
            else ""
        )
        model = f"{shape['preset']}{cut}, {shape['batch']} x {shape['seq']}"
        size = billions(row)
        product = f"{row['rate'] * size:,.0f}" if row["rate"] and size else ""
        lines.append(_line([model, row["impl"], *_speed(row), product]))
    return "\n".join(lines)


def billions(row: Row) -> float | None:
    """Parameters of what was timed; None for a cut model of a file that does not say."""
    if not row.get("parameters") and "layers" in row["shape"]:
        return None
    return (row.get("parameters") or parameter_count(preset(row["shape"]["preset"]))) / 1e9


def cost_runs(runs: Iterable[Run]) -> list[Run]:
    """The 7b's runs on the GPU that timed it last."""
    found = [run for run in ordered(runs) if not on_cpu(run) and run["rows"][0]["shape"]["preset"] == "7b"]
    return [run for run in found if run["device"] == found[0]["device"]]


def cost_table(runs: Sequence[Run], entries: Sequence[dict[str, Any]]) -> str:
    """GPU-hours and price of Open-Llama's 500 billion tokens with each side at its best batch, and its own."""
    if not (runs := cost_runs(runs)):
        return NOTHING
    fastest: dict[str, Row] = {}
    for row in (row for run in runs for row in cost.timed(run)):
        if row["rate"] > fastest.get(row["impl"], {"rate": 0})["rate"]:
            fastest[row["impl"]] = row
    sides = [
        (
            f"{name}, {row['shape']['batch']} x {row['shape']['seq']}",
            runs[0]["device"],
            row["rate"],
            cost.GPU_HOUR,
        )
        for name, row in fastest.items()
    ]
    original = next(entry for entry in entries if entry["project"] == "Open-Llama")
    sides.append(("Open-Llama, 2023", original["device"], rate_of(original), cost.ORIGINAL_GPU_HOUR))
    lines = ["| | device | tokens/s/GPU | GPU-hours | $ a GPU-hour | price |", "|---|---|---|---|---|---|"]
    for name, device, rate, gpu_hour in sides:
        hours = cost.gpu_hours(cost.TOKENS, rate)
        cells = [f"{rate:,.0f}", f"{hours:,.0f}", f"{gpu_hour:.3f}", f"${hours * gpu_hour:,.0f}"]
        lines.append(_line([name, device, *cells]))
    return "\n".join(lines)


def rate_of(entry: dict[str, Any]) -> float:
    """tokens/s/GPU of an entry of published.yaml: stated, or tokens over GPU-hours."""
    return entry.get("tokens_per_second_per_gpu") or entry["tokens"] / entry["gpu_hours"] / 3600


def published_table(entries: Sequence[dict[str, Any]], runs: Iterable[Run]) -> str:
    """What others published, after the best stored rate of each model of ours on each GPU."""
    lines = ["| | model | on | year | tokens/s/GPU | tokens/s x B |", "|---|---|---|---|---|---|"]
    best: dict[tuple[str, str], tuple[Row, Run]] = {}
    for run in (run for run in ordered(runs) if not on_cpu(run)):
        for row in (row for row in run["rows"] if row["impl"] == "ours" and row["rate"]):
            key = row["shape"]["preset"], run["device"]
            if (billions(row) or 0) * 1e9 >= COMPARABLE and (
                key not in best or row["rate"] > best[key][0]["rate"]
            ):
                best[key] = row, run
    for row, run in best.values():
        on = f"{run['device']}, {row['dtype']}, seq {row['shape']['seq']}"
        cells = [
            "ours",
            row["shape"]["preset"],
            on,
            run["date"][:4],
            *_rates(row["rate"], billions(row) or 0),
        ]
        lines.append(_line(cells, bold=True))
    for entry in entries:
        known = [entry["device"], entry.get("precision"), entry.get("seq") and f"seq {entry['seq']}"]
        cells = [f"[{entry['project']}]({entry['source']})", entry["model"], ", ".join(filter(None, known))]
        lines.append(
            _line([*cells, str(entry["year"]), *_rates(rate_of(entry), entry["parameters_billion"])])
        )
    return "\n".join(lines)


def _rates(rate: float, size: float) -> list[str]:
    return [f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}", f"{rate * size:,.0f}"]
