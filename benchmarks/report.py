"""Turns benchmarks/results/*.json into README.md's tables and the pictures in docs/: `make report`.

No figure in the README is typed by hand: what stands between its `<!-- NAME -->` and `<!-- /NAME -->` lines is written
here, with the device, versions and commit of each run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks import report_ops, report_pictures, report_training

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PUBLISHED = ROOT / "benchmarks" / "published.yaml"


def load(prefix: str) -> list[dict[str, Any]]:
    """The stored runs whose name starts with `prefix`, in name order."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{prefix}*.json"))]


def shape_text(shape: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in shape.items())


def source(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"{run['device']}; {versions}; commit {run['commit']}, {run['date']}: `{run['command']}`"


def training(runs: list[dict[str, Any]]) -> str:
    """Where a step's time goes as a picture, where a run says so, and each run's table."""
    picture = "![Where the time of a training step goes](docs/parts.svg)\n\n" * report_pictures.has_parts(
        runs
    )
    return picture + sourced(report_training.table, report_training.ordered(runs))


def sourced(table: Callable[[dict[str, Any]], str], runs: list[dict[str, Any]]) -> str:
    """Each run's table with where it comes from, or that there is none."""
    tables = [f"{table(run)}\n\n<sub>{source(run)}</sub>" for run in runs]
    return "\n\n".join(tables) or report_training.NOTHING


def cost(runs: list[dict[str, Any]], entries: list[dict[str, Any]]) -> str:
    lines = [f"<sub>{source(run)}</sub><br>" for run in report_training.cost_runs(runs)]
    return "\n".join([report_training.cost_table(runs, entries), *([""] * bool(lines)), *lines])


def published() -> list[dict[str, Any]]:
    return yaml.safe_load(PUBLISHED.read_text())


def ops_table(runs: list[dict[str, Any]]) -> str:
    """Forward + backward of each op and shape: ours, and the fastest of the others."""
    lines = [
        "| op, forward + backward | shape | ours, ms | best other | its ms | ours is |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        for ours in (r for r in run["rows"] if r["impl"].startswith("ours")):
            key = (ours["bench"], ours["shape"])
            others = [
                r for r in run["rows"] if (r["bench"], r["shape"]) == key and not r["impl"].startswith("ours")
            ]
            if not others:
                continue
            best = min(others, key=lambda r: r["ms"])
            lines.append(
                f"| {ours['bench']} | {shape_text(ours['shape'])} | {ours['ms']:.2f} | {best['impl']} | {best['ms']:.2f} | "
                f"{best['ms'] / ours['ms']:.2f}x |"
            )
    return "\n".join([*lines, "", *(f"<sub>{source(run)}</sub><br>" for run in runs)])


def gpu_runs() -> list[dict[str, Any]]:
    """The op suite's runs on GPUs, which measure the card's copy rate first."""
    return [run for run in load("ops-") if report_ops.copy_rate(run) is not None]


def gpu_ops(runs: list[dict[str, Any]]) -> str:
    """The picture, and a table for each card."""
    if not runs:
        return "no GPU results stored yet"
    tables = [f"{report_ops.table(run)}\n\n<sub>{source(run)}</sub>" for run in runs]
    return "\n\n".join(["![GB/s of each op, beside the card's copy rate](docs/ops.svg)", *tables])


def data_table(runs: list[dict[str, Any]]) -> str:
    """Each step from raw text to batches, by processes where it has some; a table for each machine."""
    tables = []
    for run in runs:
        lines = ["| step | of | rate | |", "|---|---|---|---|"]
        steps: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in run["rows"]:
            shape = {key: value for key, value in row["shape"].items() if key != "processes"}
            steps.setdefault((f"{row['bench']}, {row['impl']}", shape_text(shape)), []).append(row)
        for (step, shape), rows in steps.items():
            notes = [str(row["shape"]["processes"]) for row in rows if "processes" in row["shape"]]
            note = f"by {' / '.join(notes)} processes" if notes else ""
            note = f"padding {rows[0]['padding']:.2%}" if "padding" in rows[0] else note
            lines.append(f"| {step} | {shape} | {_rates(rows)} | {note} |")
        tables.append("\n".join([*lines, "", f"<sub>{source(run)}</sub>"]))
    return "\n\n".join(tables)


def _rates(rows: list[dict[str, Any]]) -> str:
    million = rows[0]["rate"] > 5e5
    rates = " / ".join(f"{row['rate'] / 1e6:,.1f}" if million else f"{row['rate']:,.0f}" for row in rows)
    return f"{rates} {'million ' if million else ''}{rows[0]['unit']}"


def save(figure: Any, name: str) -> None:
    import matplotlib

    DOCS.mkdir(exist_ok=True)
    for suffix in (".svg", ".png"):
        # no date and no random names: the same figures give the same file
        metadata = {"Date": None} if suffix == ".svg" else None
        with matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig((DOCS / name).with_suffix(suffix), dpi=130, metadata=metadata)


def fill(text: str, name: str, body: str) -> str:
    """`text` with what stands between NAME's two marks replaced. Raises ValueError where a mark is missing."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{README}: takes {start} and {end} once each")
    return text[: text.index(start) + len(start)] + f"\n{body}\n" + text[text.index(end) :]


def filled(text: str) -> str:
    """The README's text with its tables made anew."""
    runs, entries = load("tokens-per-second"), published()
    for name, table in (
        ("training", training(runs)),
        ("answer", sourced(report_training.answer, load("same-answer-"))),
        ("ladder", sourced(report_training.ladder, load("ladder-"))),
        ("sizes", sourced(report_training.sizes, load("sizes-"))),
        ("cost", cost(runs, entries)),
        ("published", report_training.published_table(entries, runs)),
        ("ops", ops_table(load("ops-cpu"))),
        ("ops-gpu", gpu_ops(gpu_runs())),
        ("data", data_table(load("data-"))),
    ):
        text = fill(text, name, table)
    return text


def pictures() -> dict[str, Any]:
    """A figure for each of docs/'s names whose results are stored."""
    made, runs, ops = {}, load("tokens-per-second"), gpu_runs()
    if any(row["rate"] for run in runs for row in run["rows"]):
        made["speed"] = report_pictures.speed(runs)
    if report_pictures.has_parts(runs):
        made["parts"] = report_pictures.parts(runs)
    if ops:
        made["ops"] = report_ops.draw(max(ops, key=lambda run: run["date"]))
    return made


def main() -> None:
    README.write_text(filled(README.read_text()))
    made = pictures()
    for name, figure in made.items():
        save(figure, name)
    print(f"wrote {README.name} and {DOCS.name}/{{{','.join(made)}}}.{{svg,png}}")


if __name__ == "__main__":
    main()
