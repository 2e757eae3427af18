"""The token cache: a shard folder tokenised once, in parallel, and opened by memory map.

tokens.bin holds every document as bos, ids, eos; offsets.npy (uint64) where each starts, and the end;
categories.npy (uint16) which of cache.json's names is each one's category; cache.json, written last, says what all of
it was made from.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from openllama.files import file_written_aside, read_json, write_json
from openllama.tokenizer import Tokenizer

from . import shards
from .documents import Document
from .pool import ordered_map, process_count
from .progress import bar

VERSION = 2
TOKENS, OFFSETS, CATEGORIES, INDEX = "tokens.bin", "offsets.npy", "categories.npy", "cache.json"
MOST_CATEGORIES = 1 << 16
# Handed to a worker at once: characters of text, and at most so many texts. Small enough that memory stays
# flat, large enough to hide the hand-over.
BATCH_CHARACTERS, BATCH_TEXTS = 1 << 18, 256
# Of text, at least: a process takes as long to start as it needs for about this much.
BYTES_PER_PROCESS = 8 << 20

_KEYS = ("tokens", "documents", "text_bytes", "categories", "vocab_size", "pad_id", "fingerprint", "dtype")
_MADE_FROM = ("tokenizer", "shards")  # compared by `tokenize` only

# ids of all documents; of each the length, the category, the bytes of its text
Encoded = tuple[np.ndarray, np.ndarray, list[str], list[int]]


class TokenCache:
    """A finished cache. `cache[i]` are the ids of document i (a view of the file); `lengths` those of all.

    `category_of` (uint16) numbers each one's category among `categories`, {name: bytes of its text}. Also `tokens`,
    `text_bytes`, `vocab_size`, `pad_id`, and `fingerprint`, which stands for the tokens' content.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / INDEX).exists():
            raise FileNotFoundError(
                f"{self.path}: no {INDEX}; takes a folder made by openllama.data.cache.tokenize"
            )
        self.meta = read_json(self.path / INDEX, VERSION, _KEYS)
        self.tokens: int = self.meta["tokens"]
        self.text_bytes: int = self.meta["text_bytes"]
        self.vocab_size: int = self.meta["vocab_size"]
        self.pad_id: int = self.meta["pad_id"]
        self.fingerprint: str = self.meta["fingerprint"]
        self.categories: dict[str, int] = self.meta["categories"]
        dtype = np.dtype(self.meta["dtype"])
        self._expect(TOKENS, self.tokens * dtype.itemsize)
        self.offsets = self._load(OFFSETS, self.meta["documents"] + 1)
        if self.offsets[-1] != self.tokens:
            raise ValueError(f"{self.path / OFFSETS}: does not fit {INDEX}; {_AGAIN}")
        self.category_of = self._load(CATEGORIES, self.meta["documents"])
        # A plain view: indexing numpy's memmap class itself is slower.
        self.ids: np.ndarray = np.memmap(self.path / TOKENS, dtype, mode="r").view(np.ndarray)  # (tokens,)

    def _expect(self, name: str, size: int) -> None:
        path = self.path / name
        got = path.stat().st_size if path.exists() else "no such file"
        if got != size:
            raise ValueError(f"{path}: {INDEX} says {size} bytes, got {got}; {_AGAIN}")

    def _load(self, name: str, length: int) -> np.ndarray:
        try:
            found = np.load(self.path / name, mmap_mode="r").view(np.ndarray)
        except (OSError, ValueError, EOFError) as e:
            raise ValueError(f"{self.path / name}: cannot be read ({e}); {_AGAIN}") from None
        if len(found) != length:
            raise ValueError(f"{self.path / name}: does not fit {INDEX}; {_AGAIN}")
        return found

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"document: got {i}, takes 0 to {len(self) - 1} ({self.path})")
        return self.ids[int(self.offsets[i]) : int(self.offsets[i + 1])]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets).astype(np.int64)


_AGAIN = "remove the folder and tokenise again"


def tokenize(
    shards_dir: str | Path,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    processes: int | None = None,
    progress: bool = True,
) -> TokenCache:
    """Tokenises a shard folder into `out_dir`, or opens what the same shards and tokenizer gave before.

    `processes`: default one per core, fewer for a small corpus; the result does not depend on it. A cache
    made from other shards or another tokenizer raises ValueError. Says how fast it was, with `progress`.
    """
    manifest = shards.read_manifest(shards_dir)
    out, made_from = Path(out_dir), _made_from(shards_dir, tokenizer)
    if (out / INDEX).exists():
        if not (stale := _differences(read_json(out / INDEX, VERSION, _MADE_FROM), made_from)):
            return TokenCache(out)
        raise ValueError(f"{out}: made from {stale}; remove {out}, or choose another `out`")
    if len(manifest["categories"]) > MOST_CATEGORIES:
        raise ValueError(
            f"{shards_dir}: {len(manifest['categories']):,} categories, takes at most {MOST_CATEGORIES:,}; "
            "prepare it with another category key"
        )
    processes = process_count(processes, manifest["text_bytes"], BYTES_PER_PROCESS)
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with bar("tokenising", manifest["text_bytes"], progress) as advance:
        batches = _batches(shards.read_shards(shards_dir))
        counts = _write(
            out, made_from["dtype"], ordered_map(_encode, batches, processes, (tokenizer,)), advance
        )
    write_json(out / INDEX, {"version": VERSION, **made_from, **counts})
    if progress:
        seconds = time.perf_counter() - began
        print(
            f"tokenised {counts['tokens']:,} tokens in {seconds:.1f} s: {counts['tokens'] / seconds:,.0f} tokens/s, "
            f"{processes} process{'es' * (processes > 1)}",
            flush=True,
        )
    return TokenCache(out)


def _made_from(shards_dir: str | Path, tokenizer: Tokenizer) -> dict[str, Any]:
    parts = {"tokenizer": tokenizer.fingerprint, "shards": shards.fingerprint(shards_dir)}
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    whole = hashlib.sha256(f"{VERSION} {parts['tokenizer']} {parts['shards']}".encode()).hexdigest()
    return {
        **parts,
        "fingerprint": whole,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
    }


def _differences(meta: dict[str, Any], made_from: dict[str, Any]) -> str:
    return " and ".join(
        f"{name} {meta[name][:12]}, but {name} is now {made_from[name][:12]}"
        for name in _MADE_FROM
        if meta[name] != made_from[name]
    )


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[str, str]]]:
    """(text, category) of some documents at a time."""
    batch: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        batch.append((document["text"], document["meta"]["category"]))
        size += len(document["text"])
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[tuple[str, str]], tokenizer: Tokenizer) -> Encoded:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    documents = [
        np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], dtype) for text, _ in batch
    ]
    lengths = np.array([len(d) for d in documents], np.uint64)
    sizes = [len(text.encode()) for text, _ in batch]
    return np.concatenate(documents), lengths, [category for _, category in batch], sizes


def _write(
    out: Path, dtype: str, results: Iterable[Encoded], advance: Callable[[int], None]
) -> dict[str, Any]:
    offsets, numbers = array("Q", [0]), array("H")
    text_bytes: dict[str, int] = {}  # of each category, in the order they come
    order: dict[str, int] = {}
    with file_written_aside(out / TOKENS) as file:
        for ids, lengths, categories, sizes in results:
            file.write(ids.astype(dtype, copy=False).tobytes())
            offsets.extend((np.cumsum(lengths, dtype=np.uint64) + np.uint64(offsets[-1])).tolist())
            for name, size in zip(categories, sizes):
                text_bytes[name] = text_bytes.get(name, 0) + size
                numbers.append(order.setdefault(name, len(order)))
            advance(sum(sizes))
    with file_written_aside(out / OFFSETS) as file:
        np.save(file, np.frombuffer(offsets, np.uint64))
    with file_written_aside(out / CATEGORIES) as file:
        np.save(file, np.frombuffer(numbers, np.uint16))
    return {
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "text_bytes": sum(text_bytes.values()),
        "categories": text_bytes,
    }
