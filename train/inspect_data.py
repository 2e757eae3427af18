"""What the model is going to see: packs of a run's first batches, decoded, with document borders and padding.

python train/inspect_data.py --config train/configs/tiny.yaml --packs 3
"""

from __future__ import annotations

import argparse

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
    return parser.parse_intermixed_args()


def main() -> None:
    args = arguments()
    for name, least in (("packs", 1), ("epoch", 0), ("characters", 1)):
        if (got := getattr(args, name)) < least:
            raise ValueError(f"--{name}: got {got}, takes a whole number of at least {least}")
    from rich.console import Console

    from openllama.config import load
    from openllama.tokenizer import Tokenizer
    from openllama.training.config import TrainConfig
    from openllama.training.inputs import check_inputs, packed_loader, token_caches

    config = load(TrainConfig, args.config, args.overrides)
    tokenizer = Tokenizer(config.tokenizer)
    check_inputs(config, tokenizer)
    print(
        f"tokenising into {config.out}/tokens what is not there yet (train/pretrain.py uses it too)",
        flush=True,
    )
    loader = packed_loader(config, token_caches(config, tokenizer, "train"), "train", batch=1)
    loader.epoch = args.epoch
    console = Console(highlight=False)
    console.print(
        f"{loader.packs:,} packs of {config.context} an epoch, {loader.targets_per_epoch:,} labels, "
        f"{loader.padding_share:.2%} padding; fingerprint {loader.state_dict()['fingerprint'][:12]}"
    )
    order = zip(loader.order(args.epoch)[: args.packs], loader.draws(args.epoch), loader)
    for pack, draw, batch in order:
        show(console, loader, pack, loader.pieces(int(draw)), batch, tokenizer, args.characters)


def show(console, loader, pack: int, pieces, batch, tokenizer, characters: int) -> None:
    """One pack: a rule, then each piece under the line that says whose it is."""
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
        # rich would take parts of names and texts for its markup, or break their lines
        console.out(f"── document {piece.document:,} of {whose}, {part} of its {total:,}", style="bold")
        ids = batch.ids[begin : begin + piece.length].tolist()
        print(shortened(tokenizer.decode(ids), characters))


def shortened(text: str, characters: int) -> str:
    if len(text) <= 2 * characters:
        return text
    return f"{text[:characters]}\n[... {len(text) - 2 * characters:,} characters ...]\n{text[-characters:]}"


if __name__ == "__main__":
    cli.run(main)
