"""A small tokenizer, and token caches made by hand."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from openllama import tokenizer
from openllama.data.cache import TokenCache
from openllama.data.shards import ShardWriter


@pytest.fixture(scope="session")
def texts():
    """Some 400 KB of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [p.read_text(encoding="utf-8") for p in sorted(folder.glob("[a-c]*.py"))][:40]


@pytest.fixture(scope="session")
def small(texts, tmp_path_factory):
    """A tokenizer of 1,000 pieces."""
    return tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 1000)


@pytest.fixture
def shards_of(tmp_path):
    """Writes a shard folder from texts."""

    def write(texts, name="shards", **options):
        with ShardWriter(tmp_path / name, {"source": "test"}, **options) as writer:
            for i, text in enumerate(texts):
                writer.write({"text": text, "meta": {"category": "test", "path": str(i)}})
        return tmp_path / name

    return write


@pytest.fixture
def cache_of(tmp_path):
    """Writes a token cache from lists of ids."""

    def write(documents, name="cache", fingerprint="f", categories=None):
        folder = tmp_path / name
        folder.mkdir()
        offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype(np.uint64)
        np.concatenate(documents).astype(np.uint16).tofile(folder / "tokens.bin")
        offsets.tofile(folder / "offsets.bin")
        names = list(dict.fromkeys(categories or ["test"]))
        numbers = [names.index(c) for c in categories or ["test"] * len(documents)]
        np.array(numbers, np.uint16).tofile(folder / "categories.bin")
        meta = {
            "version": 2,
            "categories": dict.fromkeys(names, 1),
            "dtype": "uint16",
            "documents": len(documents),
            "tokens": int(offsets[-1]),
            "text_bytes": 1,
            "vocab_size": 65536,
            "pad_id": 3,
            "fingerprint": fingerprint,
        }
        (folder / "cache.json").write_text(json.dumps(meta))
        return TokenCache(folder)

    return write


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:04d} " * 20}) + "\n" for i in range(300)))
    return path


@pytest.fixture
def files(tmp_path):
    """Five files of 57 records, some of them damaged, in two formats."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for f in range(5):
        rows = [{"body": f"{f} {i} " + "x" * (i % 7), "kind": f"k{i % 3}"} for i in range(57)]
        encoded = [json.dumps(r) if i % 10 else "{}" for i, r in enumerate(rows)]
        if f % 2:
            (folder / f"{f}.json").write_text("[" + ",\n".join(encoded) + "]")
        else:
            (folder / f"{f}.jsonl").write_text("\n".join(encoded))
    return folder
