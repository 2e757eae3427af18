"""The data of a run: checked before what takes long, tokenised and packed into its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from openllama.data.cache import TokenCache, tokenize
from openllama.data.loader import PackedLoader
from openllama.data.packed import check_mix
from openllama.data.shards import read_manifest
from openllama.load import find_model
from openllama.tokenizer import Tokenizer

from .config import TrainConfig, by_name

Split = Literal["train", "valid"]


def check_inputs(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """What tokenising, which may take hours, does not need but training does. Raises ValueError, FileNotFoundError."""
    vocab_size = config.model_config().vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{config.tokenizer}: its vocabulary of {tokenizer.vocab_size} is over the model's vocab_size="
            f"{vocab_size}; set model.vocab_size={tokenizer.vocab_size} or train a smaller tokenizer"
        )
    if config.start_from is not None:
        find_model(config.start_from)
    manifests = {name: read_manifest(folder) for name, folder in by_name(config.shards).items()}
    check_mix(config.mix, {name: manifest["categories"] for name, manifest in manifests.items()})
    for folder in by_name(config.valid_shards).values():
        read_manifest(folder)


def token_caches(
    config: TrainConfig, tokenizer: Tokenizer, split: Split, progress: bool = True
) -> dict[str, TokenCache]:
    """The token cache of each source; made where it is not there yet."""
    shards = config.shards if split == "train" else config.valid_shards
    return {
        name: tokenize(
            folder,
            tokenizer,
            Path(config.out) / "tokens" / split / name,
            processes=config.processes,
            progress=progress,
        )
        for name, folder in by_name(shards).items()
    }


def packed_loader(
    config: TrainConfig,
    sources: dict[str, TokenCache],
    split: Split,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
) -> PackedLoader:
    """The loader of a split, whose packs are kept until other settings need others. Held-out documents are taken whole, each
    once."""
    mix, long = (config.mix, config.long) if split == "train" else ({}, "split")
    keep = Path(config.out) / "tokens" / f"{split}-packs"
    return PackedLoader(
        sources, config.context, batch, config.seed, rank, world_size, mix=mix, long=long, keep=keep
    )
