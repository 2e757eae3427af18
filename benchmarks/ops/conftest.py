"""One schema and one table for the op benchmarks.

    python -m pytest benchmarks/ops -q            # all: under 90 s on two CPU cores, under 8 minutes on a GPU; close what else runs
    OMP_NUM_THREADS=1 python -m pytest ...        # on a shared machine: threads that wait for a core cost 4 ms a wait
    python -m pytest benchmarks/ops/bench_swiglu.py -q
    python -m pytest benchmarks/ops -q -k rms_norm --impls ours

A case for the CPU is `def test_...(versus, ...)`, which hands `versus` the implementations to compare: ours first, then what
a user of PyTorch writes. One for a GPU is marked `gpu`, and hands `race` what builds them; where there is a GPU these
stand in the place of the file's others. Both run interleaved on the same fresh random data; the figure is the median. The
session ends with a table; that of the whole suite stores its rows in benchmarks/results/ops-<device>.json.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.ops import bars, timing
from benchmarks.ops.timing import DEVICE
from openllama import devices
from openllama.kernels import backend

ROUNDS, SECONDS = 15, 0.3  # of each implementation on the CPU: at most so many runs, and about so long
ROWS: list[dict] = []
HERE = Path(__file__).resolve().parent


def pytest_addoption(parser):
    parser.addoption(
        "--impls",
        default="",
        help="on a GPU only these, such as `ours` or `ours:cuda,compile`; stores nothing",
    )


def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table has no ratios; ours does


def pytest_collect_file(parent, file_path):
    ours = file_path.name.startswith("bench_") and file_path.suffix == ".py"
    if ours and not parent.session.isinitpath(file_path):  # pytest itself collects a file that was named
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(items):
    """Where there is a GPU, a file's cases for one replace its others; elsewhere they are left out."""
    for_gpu = {item: item.get_closest_marker("gpu") is not None for item in items}
    replaced = {item.path for item in items if for_gpu[item]} if DEVICE == "cuda" else set()
    items[:] = [item for item in items if (DEVICE == "cuda" if for_gpu[item] else item.path not in replaced)]


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames:
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if DEVICE == "cuda":
            del dtypes["fp32"]
        metafunc.parametrize("dtype", list(dtypes.values()), ids=list(dtypes))


def rounds_for(step) -> int:
    """As many rounds as fit in SECONDS, of 3 to ROUNDS; also warms up."""
    step()
    start = time.perf_counter()
    step()
    return max(3, min(ROUNDS, math.ceil(SECONDS / (time.perf_counter() - start))))


@pytest.fixture
def versus(request):
    """versus(bench, shape, bytes, {"ours": step, "eager": step, ...}): times each step and records a row for each.

    `bytes` is what the operation must at least move; the rate is that over the median time. pytest-benchmark times our
    own step too, for its statistics.
    """

    def compare(bench: str, shape: dict, moved: float, steps: dict) -> None:
        op = next(op for op in backend.TABLE if bench.startswith(op))
        chosen = backend.explain(op, torch.device(DEVICE), getattr(torch, shape["dtype"])).backend
        named = {f"ours:{chosen}" if name == "ours" else name: step for name, step in steps.items()}
        if DEVICE == "cuda":
            builders = {name: partial(_same, step) for name, step in named.items()}
            request.getfixturevalue("race")(bench, shape, builders, moved=moved)
            return
        rounds = min(rounds_for(step) for step in steps.values())
        times: dict[str, list[float]] = {name: [] for name in named}
        order = list(named.items())
        # interleaved and in turn, so that clocks, neighbours and caches fall on all alike
        for _ in range(rounds):
            order.append(order.pop(0))
            for name, step in order:
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
        request.getfixturevalue("benchmark").pedantic(next(iter(steps.values())), rounds=3, iterations=1)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            ROWS.append(
                {
                    "bench": bench,
                    "shape": shape,
                    "impl": name,
                    "ms": round(median * 1e3, 4),
                    "rate": round(moved / median / 1e9, 2),
                    "unit": "GB/s",
                    "rounds": rounds,
                }
            )

    return compare


def _same(step):
    return step


@pytest.fixture(scope="session")
def copy_rate() -> float:
    """GB/s of a 1 GiB tensor's copy, read and written: the ceiling of all that only moves memory."""
    source = timing.random(2**29)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes
    made = timing.race({"torch": lambda: partial(target.copy_, source)})["torch"]
    row = row_of("copy", {"gib": 1}, "torch", source.dtype, made, moved, None, moved / made.ms / 1e6)
    ROWS.append(row)
    return row["rate"]


@pytest.fixture
def race(copy_rate, request):
    """race(bench, shape, {impl: builder}, moved=bytes): times what the builders make and records a row for each.

    `moved` is what an ideal kernel reads and writes; `flops` in its place what it computes. `prepare` and `memory` are those
    of timing.race. What raises gets a row that says so.
    """
    wanted = [word for word in request.config.getoption("--impls").split(",") if word]

    def compete(
        bench, shape, builders, *, moved=None, flops=None, prepare=None, memory=False, dtype=torch.bfloat16
    ) -> None:
        if wanted:
            builders = {name: b for name, b in builders.items() if any(w in name for w in wanted)}
        ceiling = copy_rate
        if flops is not None:
            ceiling = (devices.peak_flops(torch.device(DEVICE), torch.bfloat16) or 0) / 1e12
        for name, made in timing.race(builders, prepare, memory).items():
            ROWS.append(row_of(bench, shape, name, dtype, made, moved, flops, ceiling))

    torch._dynamo.reset()  # it refuses to compile a function for more than a few shapes
    yield compete
    gc.collect()
    torch.cuda.empty_cache()


def row_of(bench, shape, impl, dtype, made: timing.Result, moved, flops, ceiling: float) -> dict:
    """A row of the stored schema; `rate` and `ceiling` are GB/s of `moved`, or TFLOP/s of `flops`."""
    unit, work = ("GB/s", moved / 1e9) if flops is None else ("TFLOP/s", flops / 1e12)
    rate = work / made.ms * 1e3 if made.ms else None
    return {
        "bench": bench,
        "shape": shape,
        "impl": impl,
        "dtype": str(dtype)[6:],
        "ms": made.ms and round(made.ms, 5),
        "rate": rate and round(rate, 1),
        "unit": unit,
        "of_ceiling": round(rate / ceiling, 4) if rate and ceiling else None,
        **({"bytes": moved} if flops is None else {"flops": flops}),
        **({} if made.peak_gib is None else {"peak_gib": round(made.peak_gib, 3)}),
        **({"error": made.error} if made.error else {"rounds": made.rounds}),
    }


@pytest.fixture
def device() -> str:
    return DEVICE


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if not ROWS:
        return
    option = config.option
    chosen = option.keyword or option.markexpr or option.deselect or option.impls
    paths = [(config.invocation_params.dir / arg).resolve() for arg in config.args]
    if paths == [HERE] and not chosen and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        path = results.write("ops", ROWS, torch.device(DEVICE))
        terminalreporter.section(f"{path.name} in {path.parent.name}")
    else:
        terminalreporter.section("a part of the suite: not stored")
    for line in bars.table(ROWS) if DEVICE == "cuda" else table(ROWS):
        terminalreporter.write_line(line)


def table(rows: list[dict]) -> list[str]:
    """A line for each benchmark and shape: our time, then each other's and its ratio to ours."""
    lines = []
    for ours, *others in bars.grouped(rows):
        shape = " ".join(str(v) if k == "dtype" else f"{k}={v}" for k, v in ours["shape"].items())
        versus = "  ".join(f"{o['impl']} {o['ms']:.3f} ms ({o['ms'] / ours['ms']:.2f}x)" for o in others)
        lines.append(
            f"{ours['bench']:22} {shape:44} {ours['impl']} {ours['ms']:8.3f} ms {ours['rate']:6.1f} GB/s | {versus}"
        )
    return lines
