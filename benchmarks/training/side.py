"""One side in a process of its own: `python -m benchmarks.training.side --side JSON --work JSON --out FILE`.

benchmarks/training/runner.py starts it. What it measured, or why it could not, goes to FILE as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import hf
from benchmarks.training import memory, ours, parts, weights
from benchmarks.training.sides import Side
from benchmarks.training.work import Work
from openllama import devices
from openllama.config import ModelConfig
from openllama.data.loader import Batch
from openllama.files import write_json
from openllama.model import flops_per_token
from openllama.training.memory import usable_bytes

OUT_OF_MEMORY = "out of memory"  # torch's own messages go on for a paragraph


def measure(side: Side, work: Work, device: torch.device) -> dict[str, Any]:
    """A row's figures. Where memory runs out and the form of AdamW was ours to choose, the next leaner one is tried."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = work.config
    if work.fit_layers:
        config = memory.largest_cut(config, work, dtype, usable_bytes(device))
        work = dataclasses.replace(work, layers=config.layers)
    builders = _builders(side, work, config, device, dtype)
    for i, builder in enumerate(builders):
        try:
            return _measured(builder(), work, config, device, dtype) | {"shape": work.shape}
        except RuntimeError as error:
            if not ran_out(error) or i == len(builders) - 1:
                raise
        print(f"{side.impl}: out of memory; now with a leaner AdamW", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    raise AssertionError("unreachable")


def _builders(side: Side, work: Work, config: ModelConfig, device, dtype) -> list[Any]:
    settings = dict(side.settings)
    if side.model == "hf":
        return [partial(hf.build, config, device, dtype, work.batch, **settings)]
    if side.model != "ours":
        raise ValueError(f"model: got {side.model!r}, takes 'ours' or 'hf'")
    moments, masters = settings.pop("moments", "auto"), settings.pop("masters", "auto")
    forms = ours.forms(work, config, device, dtype, moments, masters, settings.get("recompute"))
    return [partial(ours.build, work, config, device, dtype, form, **settings) for form in forms]


def _measured(stepper: Any, work: Work, config: ModelConfig, device, dtype) -> dict[str, Any]:
    steps = weights.steps_of(work, config, work.warmup + work.steps)
    print(f"{stepper.optimizer_words}; {work.warmup} + {work.steps} steps", flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timed = [timed_step(stepper, batches, device) for batches in steps]
    losses = [loss for loss, _ in timed]
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError(f"a loss that is not finite: {losses}")
    seconds = statistics.median(s for _, s in timed[work.warmup :])
    rate = work.tokens / seconds
    flops, peak = rate * flops_per_token(config, work.seq), devices.peak_flops(device, dtype)
    gib = devices.peak_memory_gib(device)
    return {
        "optimizer": stepper.optimizer_words,
        "settings": stepper.settings_words,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": seconds * 1e3,
        "rate": rate,
        "model_tflops": flops / 1e12,
        "of_ceiling": flops / peak if peak else None,
        "peak_gib": gib,
        "parameters": sum(p.numel() for p in stepper.model.parameters()),
        "losses": [losses[0], losses[-1]],
        "parts": _parts(stepper, steps[-1], seconds, device) if work.parts else None,
    }


def timed_step(stepper: Any, batches: Sequence[Batch], device: torch.device) -> tuple[float, float]:
    """Loss and seconds of one optimizer step, between two waits for the device; none lies within."""
    _wait(device)
    start = time.perf_counter()
    loss = stepper.step(batches)
    _wait(device)
    seconds = time.perf_counter() - start
    return float(loss), seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parts(stepper: Any, batches: Sequence[Batch], seconds: float, device) -> dict[str, float] | None:
    if device.type != "cuda":
        return None
    return parts.profiled(lambda: timed_step(stepper, batches, device), seconds * 1e3)


def ran_out(error: Exception) -> bool:
    """Of memory: torch's allocator has a class for it, drivers and libraries have words."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in words or "alloc_failed" in words)
    )


def reason(error: Exception) -> str:
    """The row's `error`."""
    if isinstance(error, hf.NotInstalled):
        return "not installed"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(
        ("openllama", "benchmarks")
    ):
        return "not installed"
    if ran_out(error):
        return OUT_OF_MEMORY
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"[:200]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=json.loads, required=True, help="impl, model, settings")
    parser.add_argument("--work", type=json.loads, required=True, help="the fields of Work")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        answer = measure(Side(**args.side), Work(**args.work), device)
    except Exception as error:  # whatever a package may raise: it is this side's row
        answer = {"error": reason(error)}
        if answer["error"] not in ("not installed", OUT_OF_MEMORY):
            import traceback

            traceback.print_exc()
    write_json(args.out, answer | {"device": device.type})


if __name__ == "__main__":
    main()
