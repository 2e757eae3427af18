"""Shards to a SentencePiece tokenizer, and how many bytes its tokens hold, by category and script.

python train/train_tokenizer.py --shards runs/shards/train --vocab-size 4096 --out runs/tokenizer.model
python train/train_tokenizer.py --shards runs/wudao/shards/train:5 --shards runs/pile/shards/train:10 \\
    --vocab-size 100000 --out runs/tokenizer.model        # as Open-Llama: 5 shards of WuDao, 10 of the Pile
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from openllama import cli

Value = TypeVar("Value")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards",
        required=True,
        action="append",
        metavar="FOLDER[:N]",
        help="folder made by train/prepare_data.py, e.g. runs/shards/train; N: exactly so many of its shards "
        "(default: as many as the sample takes); may be given again",
    )
    parser.add_argument("--out", required=True, help="where to write the model, e.g. runs/tokenizer.model")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=100_000,
        help="pieces, special ids and bytes included (default: 100000); what the text can't fill is an error that says "
        "how many it can",
    )
    parser.add_argument(
        "--sample-bytes",
        type=int,
        default=100_000_000,
        help="train on about this much text, chosen by hash (default: 100 MB; lower it if memory runs out), but on at "
        "most 95%% of it all: on the rest bytes per token are counted",
    )
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="CATEGORY=WEIGHT",
        help="take so many times more of this category than of the others; 0: none; may be given again",
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    from openllama import tokenizer
    from openllama.data.documents import Document
    from openllama.data.sample import sample

    folders = unique("--shards", map(folder_and_count, args.shards))
    weights = unique("--weight", map(category_and_weight, args.weight))
    start = time.perf_counter()
    held_out: list[Document] = []
    texts = (d["text"] for d in sample(folders, args.sample_bytes, weights, held_out))
    trained = tokenizer.train(texts, args.out, args.vocab_size)
    print(f"wrote {args.out}: {trained.vocab_size:,} pieces, {time.perf_counter() - start:.1f} s")
    if not held_out:
        print("bytes per token: not counted; in so little text none was left to hold out")
        return
    size = sum(len(d["text"].encode()) for d in held_out)
    print(f"bytes per token, of {size / 1e6:.1f} MB of text that it was not trained on:")
    for name, rate in tokenizer.compression(trained, held_out).items():
        print(f"{rate:9.3f}  {name}")


def unique(option: str, pairs: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{option}: got {name} twice, takes each once")
        found[name] = value
    return found


def folder_and_count(value: str) -> tuple[str, int | None]:
    """FOLDER:N, or the name of a folder, which may hold a colon itself."""
    folder, _, count = value.rpartition(":")
    if folder and count.isdigit() and not Path(value).exists():
        return folder, int(count)
    return value, None


def category_and_weight(value: str) -> tuple[str, float]:
    category, _, weight = value.rpartition("=")
    try:
        return category, float(weight)
    except ValueError:
        raise ValueError(f"--weight: got {value!r}, takes CATEGORY=WEIGHT, e.g. Github=0.5") from None


if __name__ == "__main__":
    cli.run(main)
