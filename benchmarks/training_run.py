"""A real pre-training run, its metrics kept: `python -m benchmarks.training_run --config train/configs/125m.yaml steps=200`.

Stores every logged step (loss, grad norm, tokens/s/GPU, MFU) and validation in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import results
from openllama import cli
from openllama.config import load
from openllama.training.config import TrainConfig
from openllama.training.loop import Trainer
from openllama.training.monitor import read_metrics


def rows(config: TrainConfig, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each record; `ms` is that of an optimizer step on one device."""
    shape = {
        "preset": config.preset,
        "batch": config.batch,
        "seq": config.context,
        "accumulation": config.accumulation,
    }
    tokens = config.batch * config.context * config.accumulation
    return [
        {
            "bench": "pretrain",
            "shape": shape,
            "impl": "ours",
            "dtype": config.dtype,
            "ms": tokens / r["tokens_per_second_per_gpu"] * 1e3 if "loss" in r else None,
            "rate": r.get("tokens_per_second_per_gpu"),
            "unit": "tokens/s",
            "of_ceiling": r.get("mfu"),
            "peak_gib": r.get("memory_gib"),
            **{k: r[k] for k in ("step", "loss", "grad_norm", "valid_loss", "valid_bits_per_byte") if k in r},
        }
        for r in records
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = load(TrainConfig, args.config, args.overrides)
    trainer = Trainer(config)
    if trainer.step:
        sys.exit(
            f"error: {config.out} holds a run at step {trainer.step}; takes a new `out`, to time a whole run"
        )
    if code := trainer.run():
        sys.exit(code)
    made = rows(config, read_metrics(Path(config.out) / "metrics.jsonl"))
    steps = [r for r in made if "loss" in r]
    print(
        f"loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}, "
        f"median {statistics.median(r['rate'] for r in steps):,.0f} tokens/s/GPU"
    )
    print(f"stored in {results.write(f'pretrain-{config.preset}', made, trainer.device)}")


if __name__ == "__main__":
    cli.run(main)
