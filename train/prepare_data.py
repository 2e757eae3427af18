"""Raw text to shards: OUT/train and OUT/valid, each part-*.jsonl.zst files and a manifest.

python train/prepare_data.py --source python --max-bytes 20000000 --out runs/shards
python train/prepare_data.py --source runs/pile/train --corpus pile --out runs/pile/shards

The same command again goes on where an interrupted one was.
"""

from __future__ import annotations

import argparse

from openllama import cli


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        required=True,
        help="python; code:FOLDER; hf:NAME[,CONFIG][:SPLIT]; a .jsonl or .json file (plain, .zst or .gz), .parquet "
        "or .txt; or a folder of such files",
    )
    parser.add_argument("--out", required=True, help="folder for train/ and valid/")
    parser.add_argument(
        "--corpus",
        choices=("pile", "wudao"),
        help="its keys, and its published number of lines to compare with",
    )
    parser.add_argument(
        "--text-key",
        action="append",
        help="key of the text in a record (default: text); again for a text of several, joined by newlines",
    )
    parser.add_argument(
        "--category-key", help="key of the category, e.g. meta.pile_set_name (default: the file's name)"
    )
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
        help="count what cannot be used and go on (default), or stop at the first",
    )
    parser.add_argument("--processes", type=int, help="that parse (default: one per core)")
    parser.add_argument("--lines-per-shard", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.corpus and (args.text_key or args.category_key):
        parser.error(f"--corpus {args.corpus} knows its keys; give it, or --text-key and --category-key")
    return args


def main() -> None:
    args = arguments()
    from openllama.data.documents import Fields
    from openllama.data.prepare import CORPORA, prepare
    from openllama.data.shards import LINES_PER_SHARD

    keys = Fields(tuple(args.text_key or ("text",)), args.category_key)
    made = prepare(
        args.source,
        args.out,
        args.max_bytes,
        args.valid_share,
        fields=CORPORA[args.corpus].fields if args.corpus else keys,
        on_damage=args.on_damage,
        lines_per_shard=args.lines_per_shard or LINES_PER_SHARD,
        processes=args.processes,
    )
    report(made, args)


def report(made: dict, args: argparse.Namespace) -> None:
    megabytes = made["text_bytes"] / 1e6
    what = f"{made['documents']:,} documents, {megabytes:,.1f} MB"
    if made["reused"]:
        print(f"reusing {args.out}: {what}")
    else:
        print(f"wrote {args.out}: {what}, {made['rate'] / 1e6:.1f} MB/s")
    for category, counts in made["train"]["categories"].items():
        print(
            f"  {category}: {counts['lines']:,} documents, {counts['text_bytes'] / 1e6:,.1f} MB to train on"
        )
    for kind, count in sorted(made["passed_over"].items()):
        print(f"passed over: {count:,} x {kind}")
    damage = made["train"]["damage"]["counts"]
    for reason, count in damage.items():
        print(f"skipped: {count:,} x {reason} (examples in {args.out}/train/manifest.json)")
    if args.corpus and args.max_bytes is None:
        compare(made["documents"] + sum(damage.values()), args.corpus)


def compare(lines: int, corpus: str) -> None:
    """With the published size: a set that was cut short while it was downloaded shows here."""
    from openllama.data.prepare import CORPORA

    _, published, fewer = CORPORA[corpus]
    if lines == published:
        print(f"{lines:,} lines read: the whole of {corpus}, as published")
    else:
        share = f"{lines / published:.2%} of the {published:,} published for {corpus}"
        print(f"{lines:,} lines read, {share}{f' ({fewer})' if fewer else ''}")


if __name__ == "__main__":
    cli.run(main)
