"""Training speed of ours and of its peers: `python -m benchmarks.tokens_per_second --preset 125m --batch 8 --seq 1024`.

Ours is the very step that pre-training runs. It and each peer run one after the other, each in a process of its own, with the
same weights and batches; medians of whole optimizer steps are compared. A peer that is not installed, fails, or does
other work is a row that says so.
"""

from __future__ import annotations

import argparse
from typing import get_args

from benchmarks.training import runner, sides, work
from openllama import cli
from openllama.optim import Masters, Moments


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    work.add_arguments(parser, "125m")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=["all"],
        metavar="PEER",
        help=f"all (default; on a CPU {' '.join(sides.ON_A_CPU)}), none, or some of {', '.join(sides.PEERS)}",
    )
    parser.add_argument(
        "--moments",
        default="auto",
        choices=["auto", *get_args(Moments)],
        help="of our AdamW; auto: fp32 where it fits, else the first leaner form that does",
    )
    parser.add_argument("--masters", default="auto", choices=["auto", *get_args(Masters)])
    parser.add_argument(
        "--recompute",
        choices=["none", "norm", "mlp", "full"],
        help="what our backward makes again (default: as trained)",
    )
    parser.add_argument(
        "--graph", choices=["on", "off"], help="our step as a CUDA graph (default: as trained)"
    )
    args = parser.parse_args()
    asked = work.from_arguments(args)
    peers = sides.chosen(args.peers, runner.on_gpu())
    graph = None if args.graph is None else args.graph == "on"
    ours = sides.ours(args.moments, args.masters, recompute=args.recompute, graph=graph)
    rows, path = [], None
    for rows in runner.run([ours, *peers], asked):
        path = runner.store(f"tokens-per-second-{asked.suffix}", rows)
    print(f"\n{', '.join(f'{key} {value}' for key, value in asked.shape.items())}\n{runner.table(rows)}")
    print(runner.formula(asked, rows))
    print(f"stored in {path}")


if __name__ == "__main__":
    cli.run(main)
