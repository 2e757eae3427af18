"""The original README's ladder on this machine: from HuggingFace's model as it was trained then to ours, a rung at a time.

`python -m benchmarks.ladder --preset 7b --batch 2 --seq 1024 --accumulation 12`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.training import runner, work
from benchmarks.training.sides import Side
from openllama import cli

RUNGS = (
    Side(
        "HF eager + PyTorch Adam + padding mask",
        "hf",
        {"attention": "eager", "optimizer": "foreach", "padding_mask": True},
    ),
    Side("+ fused attention", "hf", {"optimizer": "foreach"}),
    Side("+ fused optimizer", "hf", {}),
    Side("our ops", "hf", {"kernels": "ours", "block": False}),
    # from here on gradients add up in fp32, and AdamW has masters: first a pass of its own for each sum
    Side("fused block, fp32 gradients and masters", "ours", {"accumulate": False, "graph": False}),
    Side("accumulation in the GEMM", "ours", {"accumulate": True, "graph": False}),
    Side("CUDA graph", "ours", {"accumulate": True, "graph": True}),
)


def climb(asked: work.Work) -> Iterator[list[runner.Row]]:
    """After each rung the rows so far; `speedup` is over the first. `ratio`, elsewhere ours over this one, is None: no
    rung is "ours"."""
    for rows in runner.run(RUNGS, asked, bench="ladder"):
        yield [row | {"speedup": row["ratio"] and 1 / row["ratio"], "ratio": None} for row in rows]


def table(rows: list[runner.Row]) -> str:
    lines = []
    for row in rows:
        figures = row["error"]
        if not figures:
            speedup = f"{row['speedup']:.2f}x" if row["speedup"] else ""
            figures = f"{row['rate']:>9,.0f} tokens/s {speedup:>7}"
        lines.append(f"{row['impl']:40} {figures}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    work.add_arguments(parser, "7b")
    asked = work.from_arguments(parser.parse_args())
    rows, path = [], None
    for rows in climb(asked):
        path = runner.store(f"ladder-{asked.suffix}", rows)
    print(f"\n{table(rows)}\n{runner.formula(asked, rows)}")
    print(f"stored in {path}")


if __name__ == "__main__":
    cli.run(main)
