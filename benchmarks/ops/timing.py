"""Times work on a GPU: implementations in turn, each call between two CUDA events, the L2 cache cleared before it.

A call is queued behind the clearing, so that the host's time to launch it (30 to 300 us of Python) is not in the figure. A call
that waits for the GPU by itself, as one with .item() in it, shows that wait: it is there in use, too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Step = Callable[[], object]
Builder = Callable[
    [], Step
]  # makes what a step needs beside its inputs; may raise where a package is missing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIN_ROUNDS, MAX_ROUNDS = 20, 200
SECONDS = 0.06  # that an implementation's rounds take, with what stands outside of the events
CLEAR = 2**28  # bytes: several times the L2 of any card
MAX_CLEARS = 32  # 2 ms on an H200


class Result(NamedTuple):
    """An implementation's median, or why it has none."""

    ms: float | None = None
    rounds: int = 0
    error: str = ""
    peak_gib: float | None = None


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Fresh normal numbers, made on the device: constants would draw less power and let the clocks rise."""
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def race(
    builders: Mapping[str, Builder], prepare: Step | None = None, memory: bool = False
) -> dict[str, Result]:
    """Times the step that each builder makes.

    `prepare` runs before each call, outside of the events: it restores what a step overwrites. `memory` measures the most that
    a call holds beside what was there before and what it returns.
    """
    flush = torch.empty(CLEAR, dtype=torch.uint8, device=DEVICE)
    before = prepare or (lambda: None)
    clearing = min(_time(flush.zero_) for _ in range(3))
    results: dict[str, Result] = {}
    runners: dict[str, Callable[[], tuple]] = {}
    peaks: dict[str, float | None] = {}
    for name, builder in builders.items():
        try:
            step = builder()
            host = _warm_up(step, before)
            peaks[name] = _peak_gib(step, before) if memory else None
        except Exception as error:  # whatever a package may raise: the others go on
            results[name] = Result(error=_reason(error))
            torch.cuda.empty_cache()
            continue
        clears = min(1 + math.ceil(host / clearing), MAX_CLEARS)
        runners[name] = lambda step=step, clears=clears: _timed(step, before, flush, clears)
    for name, times in _interleaved(runners).items():
        results[name] = Result(statistics.median(times), len(times), peak_gib=peaks[name])
    return {name: results[name] for name in builders}


def _interleaved(runners: dict[str, Callable[[], tuple]]) -> dict[str, list[float]]:
    """Milliseconds of each round, in turn, so that clocks and temperature fall on all alike."""
    if not runners:
        return {}
    round_seconds = _time(lambda: [run() for run in runners.values()])
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, math.ceil(SECONDS * len(runners) / round_seconds)))
    events: dict[str, list[tuple]] = {name: [] for name in runners}
    order = list(runners.items())
    for _ in range(rounds):
        order.append(order.pop(0))
        for name, run in order:
            events[name].append(run())
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _timed(step: Step, prepare: Step, flush: torch.Tensor, clears: int) -> tuple:
    """Queues one call and returns its events; `clears` is as often as it takes to hide the host's time."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    prepare()
    for _ in range(clears):
        flush.zero_()
    start.record()
    step()
    end.record()
    return start, end


def _warm_up(step: Step, prepare: Step) -> float:
    """Compiles, tunes, allocates. Returns the seconds that the host takes to launch a call."""
    host = 0.0
    for _ in range(3):
        prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
    return host


def _time(call: Step) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_gib(step: Step, prepare: Step) -> float:
    prepare()
    torch.cuda.reset_peak_memory_stats()
    returned = step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / 2**30
    del returned  # until here, so that it counts as there
    return peak


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("openllama"):
        return "not installed"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"[:200]
