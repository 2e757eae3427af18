"""Raw text to shards: OUT/train and OUT/valid, each part-*.jsonl.zst files and a manifest.

python train/prepare_data.py --source python --max-bytes 20000000 --out runs/shards
"""

from __future__ import annotations

import argparse

from openllama import cli


def main() -> None:
    from openllama.data.prepare import prepare
    from openllama.data.shards import LINES_PER_SHARD

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", required=True, help="python, a .jsonl, .jsonl.zst, .jsonl.gz or .txt file, or a folder"
    )
    parser.add_argument("--out", required=True, help="folder for train/ and valid/")
    parser.add_argument(
        "--max-bytes", type=int, help="stop before this much UTF-8 text is exceeded (default: take all)"
    )
    parser.add_argument(
        "--valid-share", type=float, default=0.02, help="share of documents held out (default: 0.02)"
    )
    parser.add_argument(
        "--on-damage",
        choices=("skip", "raise"),
        default="skip",
        help="count damaged lines and go on, or stop at one",
    )
    parser.add_argument("--lines-per-shard", type=int, default=LINES_PER_SHARD, help=argparse.SUPPRESS)
    args = parser.parse_args()
    made = prepare(
        args.source,
        args.out,
        args.max_bytes,
        args.valid_share,
        on_damage=args.on_damage,
        lines_per_shard=args.lines_per_shard,
    )
    megabytes = made["text_bytes"] / 1e6
    what = f"{made['documents']:,} documents, {megabytes:.1f} MB"
    if made["reused"]:
        print(f"reusing {args.out}: {what}")
    else:
        print(f"wrote {args.out}: {what}, {megabytes / made['seconds']:.1f} MB/s")
    for reason, count in made["train"]["damage"]["counts"].items():
        print(f"skipped: {count:,} x {reason} (examples in {args.out}/train/manifest.json)")


if __name__ == "__main__":
    cli.run(main)
