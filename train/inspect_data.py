"""What the model is going to see: packs of a run's first batches, decoded, with document borders and padding.

python train/inspect_data.py --config train/configs/tiny.yaml --packs 3
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from openllama import cli


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of a run, as for train/pretrain.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--packs", type=int, default=2, help="how many to show (default: 2)")
    parser.add_argument("--epoch", type=int, default=0, help="whose order is taken (default: 0)")
    parser.add_argument(
        "--characters", type=int, default=300, help="of each document's beginning and end (default: 300)"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    from rich.console import Console

    from openllama.config import load
    from openllama.data.cache import tokenize
    from openllama.data.loader import PackedLoader
    from openllama.tokenizer import Tokenizer
    from openllama.training.config import TrainConfig, by_name

    config = load(TrainConfig, args.config, args.overrides)
    tokenizer = Tokenizer(config.tokenizer)
    folder = Path(config.out) / "tokens" / "train"
    sources = {
        name: tokenize(shards, tokenizer, folder / name) for name, shards in by_name(config.shards).items()
    }
    loader = PackedLoader(sources, config.context, 1, config.seed, mix=config.mix, long=config.long)
    console = Console(highlight=False)
    console.print(
        f"{loader.packs:,} packs of {config.context} an epoch, {loader.targets_per_epoch:,} labels, "
        f"{loader.padding_share:.2%} padding; fingerprint {loader.state_dict()['fingerprint'][:12]}"
    )
    loader.epoch = args.epoch
    for pack, batch in zip(loader.order(args.epoch)[: args.packs], islice(loader, args.packs)):
        show(console, loader, int(pack), batch, tokenizer, args.characters)


def show(console, loader, pack: int, batch, tokenizer, characters: int) -> None:
    """One pack: a rule, then each piece under the line that says whose it is."""
    pieces = loader.pieces(pack)
    padding = loader.context - batch.targets
    console.rule(f"pack {pack}: {len(pieces)} pieces, {padding} of {loader.context} tokens are padding")
    for piece, begin in zip(pieces, batch.cu_seqlens.tolist()):
        cache = loader.sources[piece.source]
        category = list(cache.categories)[cache.category_of[piece.document]]
        total = len(cache[piece.document])
        whose = f"{piece.source}/{category}" if piece.source else category
        part = (
            "whole"
            if piece.length == total - 1
            else f"tokens {piece.start:,} to {piece.start + piece.length:,}"
        )
        console.print(f"[bold]── document {piece.document:,} of {whose}[/bold], {part} of its {total:,}")
        ids = batch.ids[begin : begin + piece.length].tolist()
        console.print(shortened(tokenizer.decode(ids), characters), markup=False)


def shortened(text: str, characters: int) -> str:
    if len(text) <= 2 * characters:
        return text
    return f"{text[:characters]}\n[... {len(text) - 2 * characters:,} characters ...]\n{text[-characters:]}"


if __name__ == "__main__":
    cli.run(main)
