"""Shards to a SentencePiece tokenizer, and how many bytes its tokens hold on them.

python train/train_tokenizer.py --shards runs/shards/train --vocab-size 4096 --out runs/tokenizer.model
"""

from __future__ import annotations

import argparse
import time

from openllama import cli


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards", required=True, help="folder made by train/prepare_data.py, e.g. runs/shards/train"
    )
    parser.add_argument("--out", required=True, help="where to write the model, e.g. runs/tokenizer.model")
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="pieces, special ids and bytes included (default: 4096)"
    )
    parser.add_argument(
        "--sample-bytes",
        type=int,
        default=100_000_000,
        help="train on about this much text, chosen by hash (default: 100 MB; lower it if memory runs out)",
    )
    args = parser.parse_args()
    from openllama import tokenizer
    from openllama.data.prepare import sample

    start = time.perf_counter()
    trained = tokenizer.train(sample(args.shards, args.sample_bytes), args.out, args.vocab_size)
    seconds = time.perf_counter() - start
    rate = tokenizer.bytes_per_token(trained, sample(args.shards, 20_000_000))
    print(f"wrote {args.out}: {trained.vocab_size:,} pieces, {seconds:.1f} s")
    print(f"{rate:.3f} bytes per token on {args.shards}")


if __name__ == "__main__":
    cli.run(main)
