"""What a training costs: GPU-hours, price, days. `python -m benchmarks.cost --tokens 500e9 --rate 3290 --gpu-hour 1.5`.

With `--run runs/mine/metrics.jsonl` what a run has cost so far, from the tokens and speeds it logged; with `--results
benchmarks/results/tokens-per-second-*.json` what the tokens would cost with each side of stored runs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from openllama import cli

TOKENS = 500e9  # what Open-Llama's README prices
ORIGINAL_GPU_HOUR = 12.6 / 8  # dollars: there, of eight spot A100s of Google Cloud in 2023
GPU_HOUR = 3.0  # dollars, an example: H200s were let for 2.5 to 7 in 2026 (https://www.mercatus-ai.com/blog/cloud-gpu-pricing)


def gpu_hours(tokens: float, rate: float) -> float:
    """Hours of one GPU that `tokens` take at `rate` tokens/s/GPU; of many GPUs together the same."""
    return tokens / rate / 3600


def days(hours: float, gpus: int) -> float:
    return hours / gpus / 24


def in_words(tokens: float, hours: float, gpu_hour: float, gpus: int) -> str:
    return (
        f"{tokens:,.0f} tokens at {tokens / hours / 3600:,.0f} tokens/s/GPU: {hours:,.{_digits(hours)}f} GPU-hours, "
        f"${hours * gpu_hour:,.2f} at ${gpu_hour:.2f} a GPU-hour; "
        f"{_days(days(hours, gpus))} days on {gpus} GPU{'s' * (gpus > 1)}"
    )


def _digits(hours: float) -> int:
    return 0 if hours >= 1000 else 2


def _days(number: float) -> str:
    return f"{number:,.1f}" if number >= 1 else f"{number:.2g}"


def of_records(records: Iterable[dict[str, Any]]) -> tuple[int, float]:
    """Tokens that a run has learned from, and the GPU-hours of its training steps.

    A step record's tokens are those of all processes since the first step, its speed is one GPU's since the record before,
    so their quotient is GPU-seconds on any number of GPUs, and for any `log_every`. A resumed run goes on counting.
    Validation has no speed and is not in it, nor are saving, starting up, and steps that a crash lost.

    Raises ValueError where there is no step record, or the tokens go back: then it is not the log of one run.
    """
    tokens, seconds = 0, 0.0
    for record in records:
        if "loss" not in record:
            continue
        learned, speed = record["tokens"] - tokens, record["tokens_per_second_per_gpu"]
        if learned <= 0 or not speed > 0:
            raise ValueError(
                f"step {record['step']} has {record['tokens']:,} tokens at {speed:,.0f} tokens/s, after {tokens:,}; takes "
                "the records of one run, in their order"
            )
        tokens, seconds = record["tokens"], seconds + learned / speed
    if not tokens:
        raise ValueError("no step has been logged")
    return tokens, seconds / 3600


def of_run(metrics: Path) -> tuple[int, float]:
    """`of_records` of a metrics.jsonl. Errors name `--run` and the file."""
    from openllama.training.monitor import read_metrics

    if not metrics.is_file():
        raise FileNotFoundError(f"--run: {metrics} is not a file; takes a run's metrics.jsonl")
    try:
        return of_records(read_metrics(metrics))
    except (ValueError, KeyError) as e:
        what = f"a step record without {e}" if isinstance(e, KeyError) else e
        raise ValueError(f"--run: {metrics}: {what}") from None


def timed(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The sides of a stored run that have a rate in tokens/s."""
    return [row for row in run["rows"] if row["rate"] and row["unit"] == "tokens/s"]


def table(runs: Sequence[dict[str, Any]], tokens: float, gpu_hour: float) -> str:
    """Every side's GPU-hours and price of `tokens`, a paragraph for each stored run."""
    parts = []
    for run in runs:
        rows = timed(run)
        if not rows:
            continue
        shape = ", ".join(f"{key} {value}" for key, value in rows[0]["shape"].items())
        lines = [f"{shape}, {run['device']}"]
        lines += [f"{'':<22} {'tokens/s/GPU':>12} {'GPU-hours':>12} {'price':>14}"]
        for row in rows:
            hours = gpu_hours(tokens, row["rate"])
            price = f"${hours * gpu_hour:,.0f}"
            lines.append(f"{row['impl']:<22} {row['rate']:>12,.0f} {hours:>12,.0f} {price:>14}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def of_results(paths: Sequence[Path], tokens: float, gpu_hour: float) -> str:
    """`table` of stored files. Errors name `--results` and the file."""
    runs = []
    for path in paths:
        try:
            runs.append(json.loads(path.read_text()))
            timed(runs[-1])
        except OSError as e:
            raise OSError(f"--results: {path}: {e.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--results: {path}: takes files of benchmarks/results/") from None
    if not (text := table(runs, tokens, gpu_hour)):
        raise ValueError("--results: none of these files has a rate in tokens/s")
    return f"{tokens:,.0f} tokens at ${gpu_hour:.2f} a GPU-hour\n\n{text}"


def positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"--{name}: got {value}, takes a number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--rate", type=float, help="tokens/s of one GPU")
    of.add_argument("--run", type=Path, help="a run's metrics.jsonl: what it has cost so far")
    of.add_argument("--results", type=Path, nargs="+", help="stored runs: each of their sides")
    parser.add_argument("--tokens", type=float, help=f"to train on (default: {TOKENS:.0f})")
    parser.add_argument(
        "--gpu-hour", type=float, required=True, help="price of a GPU for an hour, in dollars"
    )
    parser.add_argument("--gpus", type=int, help="GPUs at once, which makes days of hours (default: 1)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.run and args.tokens is not None:
        raise ValueError(
            "--tokens: a run's tokens are in its metrics; takes --tokens with --rate or --results"
        )
    if args.results and args.gpus is not None:
        raise ValueError("--gpus: GPU-hours and prices don't depend on it; takes --gpus with --rate or --run")
    tokens = positive("tokens", TOKENS if args.tokens is None else args.tokens)
    gpus = int(positive("gpus", 1 if args.gpus is None else args.gpus))
    positive("gpu-hour", args.gpu_hour)
    if args.results:
        print(of_results(args.results, tokens, args.gpu_hour))
        return
    if args.run:
        tokens, hours = of_run(args.run)
    else:
        hours = gpu_hours(tokens, positive("rate", args.rate))
    print(in_words(tokens, hours, args.gpu_hour, gpus))


if __name__ == "__main__":
    cli.run(main)
