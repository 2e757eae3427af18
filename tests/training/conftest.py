"""A corpus, tokenizer and settings small enough to train on in a second."""

import random

import pytest

from openllama import tokenizer
from openllama.data.shards import ShardWriter
from openllama.training.config import TrainConfig

WORDS = ["def", "return", "self", "import", "class", "value", "index", "items", "for", "in", "if", "else"]
SHAPE = {"vocab_size": 320, "hidden": 32, "intermediate": 48, "layers": 2, "heads": 4, "kv_heads": 2}


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) + "\n" for _ in range(count)]


def write_shards(folder, documents: list[str]) -> None:
    with ShardWriter(folder, {"made": "for a test"}) as writer:
        for text in documents:
            writer.write({"text": text, "meta": {"category": "test"}})


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder with train/, valid/ and tokenizer.model."""
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder / "train", texts(300, 1))
    write_shards(folder / "valid", texts(30, 2))
    tokenizer.train(texts(300, 1), folder / "tokenizer.model", SHAPE["vocab_size"])
    return folder


@pytest.fixture
def settings(corpus, tmp_path):
    """Makes a TrainConfig of a run in its own folder; keywords change it."""

    def make(**changes) -> TrainConfig:
        values = {
            "preset": "tiny",
            "model": dict(SHAPE),
            "shards": str(corpus / "train"),
            "valid_shards": str(corpus / "valid"),
            "tokenizer": str(corpus / "tokenizer.model"),
            "out": str(tmp_path / "run"),
            "dtype": "float32",
            "context": 64,
            "batch": 2,
            "accumulation": 2,
            "steps": 6,
            "lr": 1e-2,
            "warmup": 2,
            "valid_every": 3,
            "save_every": 2,
        }
        return TrainConfig(**{**values, **changes})

    return make
