"""One schema and one table for the op benchmarks.

    python -m pytest benchmarks/ops -q            # all, under 90 s on two CPU cores; close what else runs there
    OMP_NUM_THREADS=1 python -m pytest ...        # on a shared machine: threads that wait for a core cost 4 ms a wait
    python -m pytest benchmarks/ops/bench_swiglu.py -q

A benchmark is `def test_...(versus, ...)`, which hands `versus` the implementations to compare: ours first, then what
a user of PyTorch writes. They run interleaved on the same fresh random data; the figure is the median. The session
ends with a table, and benchmarks/results/ops-<device>.json holds the rows.
"""

from __future__ import annotations

import math
import statistics
import time

import pytest
import torch

from benchmarks import results
from openllama.kernels import backend

ROUNDS, SECONDS = 15, 0.3  # of each implementation: at most so many runs, and about so long
ROWS: list[dict] = []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table has no ratios; ours does


def pytest_collect_file(parent, file_path):
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def rounds_for(step) -> int:
    """As many rounds as fit in SECONDS, of 3 to ROUNDS; also warms up."""
    step()
    start = time.perf_counter()
    step()
    synchronize()
    return max(3, min(ROUNDS, math.ceil(SECONDS / (time.perf_counter() - start))))


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.fixture
def versus(benchmark):
    """versus(bench, shape, bytes, {"ours": step, "eager": step, ...}): times each step and records a row for each.

    `bytes` is what the operation must at least move; the rate is that over the median time. pytest-benchmark times our
    own step too, for its statistics.
    """

    def compare(bench: str, shape: dict, moved: float, steps: dict) -> None:
        rounds = min(rounds_for(step) for step in steps.values())
        times: dict[str, list[float]] = {name: [] for name in steps}
        order = list(steps.items())
        # interleaved and in turn, so that clocks, neighbours and caches fall on all alike
        for _ in range(rounds):
            order.append(order.pop(0))
            for name, step in order:
                start = time.perf_counter()
                step()
                synchronize()
                times[name].append(time.perf_counter() - start)
        op = next(op for op in backend.TABLE if bench.startswith(op))
        chosen = backend.explain(op, torch.device(DEVICE), getattr(torch, shape["dtype"])).backend
        benchmark.pedantic(next(iter(steps.values())), rounds=3, iterations=1)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            ROWS.append(
                {
                    "bench": bench,
                    "shape": shape,
                    "impl": f"ours:{chosen}" if name == "ours" else name,
                    "ms": round(median * 1e3, 4),
                    "rate": round(moved / median / 1e9, 2),
                    "unit": "GB/s",
                    "rounds": rounds,
                }
            )

    return compare


@pytest.fixture
def device() -> str:
    return DEVICE


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    path = results.write("ops", ROWS, torch.device(DEVICE))
    terminalreporter.section(f"{path.name} in {path.parent.name}")
    for line in table(ROWS):
        terminalreporter.write_line(line)


def table(rows: list[dict]) -> list[str]:
    """A line for each benchmark and shape: our time, then each other's and its ratio to ours."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        shape = " ".join(str(v) if k == "dtype" else f"{k}={v}" for k, v in row["shape"].items())
        groups.setdefault((row["bench"], shape), []).append(row)
    lines = []
    for (bench, shape), (ours, *others) in groups.items():
        versus = "  ".join(f"{o['impl']} {o['ms']:.3f} ms ({o['ms'] / ours['ms']:.2f}x)" for o in others)
        lines.append(
            f"{bench:22} {shape:44} {ours['impl']} {ours['ms']:8.3f} ms {ours['rate']:6.1f} GB/s | {versus}"
        )
    return lines
