"""Tokens/s/GPU of ours by model size, on one card: `python -m benchmarks.sizes --batch 2 --seq 1024 --accumulation 12`.

A model that the card does not hold whole, in the leanest form of AdamW with exact masters, is timed with as many of its layers as
fit, and its row says `layers`. Beside tokens/s stands tokens/s x billions of parameters (of the layers that ran),
which compares sizes.
"""

from __future__ import annotations

import argparse

from benchmarks.training import runner, sides, work
from openllama import cli
from openllama.presets import PRESETS

SIZES = ("7b", "13b", "33b", "65b")


def measure(asked: work.Work) -> runner.Row:
    """One size's row."""
    ((row,),) = runner.run([sides.ours()], asked, bench="sizes")
    row["rate_x_billions"] = None if row["error"] else row["rate"] * row["parameters"] / 1e9
    return row


def line(row: runner.Row) -> str:
    layers = f"{row['shape']['layers']} layers" if "layers" in row["shape"] else "whole"
    if row["error"]:
        return f"{row['shape']['preset']:>5} {row['error']}"
    return (
        f"{row['shape']['preset']:>5} {layers:>9} {row['parameters'] / 1e9:>6.2f} B {row['rate']:>9,.0f} tokens/s "
        f"{row['rate_x_billions']:>9,.0f} tokens/s x B {row['peak_gib']:>6.1f} GiB  {row['optimizer']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    work.add_step_arguments(parser, batch=2)
    parser.add_argument("--presets", nargs="+", default=list(SIZES), choices=list(PRESETS))
    args = parser.parse_args()
    asked = [work.from_arguments(args, preset=name, fit_layers=True) for name in args.presets]
    rows, path = [], None
    for one in asked:
        rows.append(measure(one))
        path = runner.store(f"sizes-b{args.batch}-s{args.seq}", rows)
    print("\n" + "\n".join(map(line, rows)))
    print(f"stored in {path}")


if __name__ == "__main__":
    cli.run(main)
