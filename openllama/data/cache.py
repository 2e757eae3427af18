"""The token cache: a shard folder tokenised once, in parallel, and opened by memory map.

tokens.bin holds every document as bos, ids, eos; offsets.bin (uint64) where each starts, and the end; categories.bin
(uint16) which of cache.json's names is each one's category; cache.json, written last, says what all of it was made from.
Until then journal.json says how many shards the files hold: an interrupted run goes on from there.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from openllama.files import goes_on_after_full_disk, read_json, sole_writer, write_json
from openllama.tokenizer import Tokenizer

from . import shards
from .pool import ordered_map, process_count
from .progress import bar

VERSION = 2
TOKENS, OFFSETS, CATEGORIES, INDEX = "tokens.bin", "offsets.bin", "categories.bin", "cache.json"
JOURNAL = "journal.json"
# Handed to a worker at once: bytes of lines, and at most so many. Small enough that memory stays flat, large enough to hide
# the hand-over.
BATCH_BYTES, BATCH_LINES = 1 << 18, 256
# Of text, at least: a process takes as long to start as it needs for about this much.
BYTES_PER_PROCESS = 8 << 20

_KEYS = ("tokens", "documents", "text_bytes", "categories", "vocab_size", "pad_id", "fingerprint", "dtype")
_MADE_FROM = ("tokenizer", "shards")  # compared by `tokenize` only


class Batch(NamedTuple):
    """Some lines of one shard, with their numbers."""

    shard: Path
    lines: list[tuple[int, bytes]]
    ends: bool  # whether the shard ends with them


class Encoded(NamedTuple):
    """What a process makes of a batch."""

    ids: np.ndarray  # of all documents
    lengths: np.ndarray  # uint64, of each document
    categories: list[str]
    text_bytes: list[int]
    ends: bool


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
        self.ids = self._open(TOKENS, self.meta["dtype"], self.tokens)
        self.offsets = self._open(OFFSETS, "uint64", self.meta["documents"] + 1)
        self.category_of = self._open(CATEGORIES, "uint16", self.meta["documents"])
        if self.offsets[-1] != self.tokens:
            raise ValueError(f"{self.path / OFFSETS}: does not fit {INDEX}; {_AGAIN}")

    def _open(self, name: str, dtype: str, length: int) -> np.ndarray:
        path, size = self.path / name, length * np.dtype(dtype).itemsize
        got = path.stat().st_size if path.exists() else "no such file"
        if got != size:
            raise ValueError(f"{path}: {INDEX} says {size} bytes, got {got}; {_AGAIN}")
        # A plain view: indexing numpy's memmap class itself is slower.
        return np.memmap(path, dtype, mode="r").view(np.ndarray)

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

    `processes`: default one per core, fewer for a small corpus; the result does not depend on it. Interrupted, it goes
    on after the last shard that was whole. A cache made from other shards or another tokenizer raises ValueError. Says
    how fast it was, with `progress`.
    """
    manifest = shards.read_manifest(shards_dir)
    out, made_from = Path(out_dir), _made_from(shards_dir, tokenizer)
    if found := _finished(out, made_from):
        return found
    if len(manifest["categories"]) > shards.MOST_CATEGORIES:
        raise ValueError(
            f"{shards_dir}: {len(manifest['categories']):,} categories, takes at most {shards.MOST_CATEGORIES:,}; "
            "prepare it with another category key"
        )
    processes = process_count(processes, manifest["text_bytes"], BYTES_PER_PROCESS)
    began = time.perf_counter()
    with sole_writer(out), goes_on_after_full_disk(out):
        if found := _finished(out, made_from):  # by a run that has just ended
            return found
        made = _write(Path(shards_dir), manifest, tokenizer, out, made_from, processes, progress)
    if progress:
        seconds = time.perf_counter() - began
        print(
            f"tokenised {made:,} tokens in {seconds:.1f} s: {made / seconds:,.0f} tokens/s, "
            f"{processes} process{'es' * (processes > 1)}",
            flush=True,
        )
    return TokenCache(out)


def _finished(out: Path, made_from: dict[str, Any]) -> TokenCache | None:
    """The cache in `out` if it is complete. Raises ValueError where it was made, or begun, from something else."""
    for name in (INDEX, JOURNAL):
        if (out / name).exists() and (
            stale := _differences(read_json(out / name, VERSION, _MADE_FROM), made_from)
        ):
            raise ValueError(f"{out}: made from {stale}; remove {out}, or choose another `out`")
    return TokenCache(out) if (out / INDEX).exists() else None


def _made_from(shards_dir: str | Path, tokenizer: Tokenizer) -> dict[str, Any]:
    parts = {"tokenizer": tokenizer.fingerprint, "shards": shards.fingerprint(shards_dir)}
    whole = hashlib.sha256(f"{VERSION} {parts['tokenizer']} {parts['shards']}".encode()).hexdigest()
    return {
        **parts,
        "fingerprint": whole,
        "dtype": _dtype(tokenizer).name,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
    }


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _differences(meta: dict[str, Any], made_from: dict[str, Any]) -> str:
    return " and ".join(
        f"{name} {meta[name][:12]}, but {name} is now {made_from[name][:12]}"
        for name in _MADE_FROM
        if meta[name] != made_from[name]
    )


_COUNTS = ("whole_shards", "documents", "tokens", "text_bytes")


class _Growing:
    """The files while they are made, and what the journal says of them."""

    def __init__(self, out: Path, made_from: dict[str, Any]) -> None:
        self.out, self.made_from = out, made_from
        self.whole_shards = self.documents = self.tokens = 0
        self.text_bytes: dict[str, int] = {}  # of each category, in the order they come
        if (out / JOURNAL).exists():
            journal = read_json(out / JOURNAL, VERSION, _COUNTS)
            self.whole_shards, self.documents, self.tokens, self.text_bytes = (journal[k] for k in _COUNTS)
        self.number = {name: i for i, name in enumerate(self.text_bytes)}
        out.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> _Growing:
        sizes = {
            TOKENS: self.tokens * np.dtype(self.made_from["dtype"]).itemsize,
            OFFSETS: 8 * self.documents,
            CATEGORIES: 2 * self.documents,
        }
        self.files = {name: self._open(name, size) for name, size in sizes.items()}
        return self

    def _open(self, name: str, size: int) -> BinaryIO:
        path = self.out / name
        path.touch()
        if path.stat().st_size < size:
            raise ValueError(
                f"{path}: {JOURNAL} says at least {size} bytes, got {path.stat().st_size}; {_AGAIN}"
            )
        file = open(path, "r+b")  # noqa: SIM115 closed by __exit__
        file.truncate(size)  # what came after the last whole shard comes again
        file.seek(size)
        return file

    def __exit__(self, *error: object) -> None:
        for file in self.files.values():
            with suppress(OSError):  # on a full disk: what failed has said so already
                file.close()

    def add(self, made: Encoded) -> None:
        self.files[TOKENS].write(made.ids.tobytes())
        ends = np.cumsum(made.lengths, dtype=np.uint64) + np.uint64(self.tokens)
        self.files[OFFSETS].write((ends - made.lengths).tobytes())
        for name, size in zip(made.categories, made.text_bytes):
            self.text_bytes[name] = self.text_bytes.get(name, 0) + size
        numbers = [self.number.setdefault(name, len(self.number)) for name in made.categories]
        self.files[CATEGORIES].write(np.array(numbers, np.uint16).tobytes())
        self.tokens, self.documents = int(ends[-1]), self.documents + len(ends)
        if made.ends:
            self.whole_shards += 1
            self._sync()
            counts = {k: getattr(self, k) for k in _COUNTS}
            write_json(self.out / JOURNAL, {"version": VERSION, **self.made_from, **counts})

    def _sync(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """The index, which makes the files count, comes last."""
        self.files[OFFSETS].write(np.uint64(self.tokens).tobytes())
        self._sync()
        index = {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": sum(self.text_bytes.values()),
            "categories": self.text_bytes,
        }
        write_json(self.out / INDEX, {"version": VERSION, **self.made_from, **index})
        (self.out / JOURNAL).unlink()


def _write(
    folder: Path,
    manifest: dict[str, Any],
    tokenizer: Tokenizer,
    out: Path,
    made_from: dict[str, Any],
    processes: int,
    progress: bool,
) -> int:
    """The number of tokens that were made now."""
    with _Growing(out, made_from) as growing, bar("tokenising", manifest["text_bytes"], progress) as advance:
        advance(sum(growing.text_bytes.values()))
        before = growing.tokens
        left = manifest["shards"][growing.whole_shards :]
        batches = (batch for entry in left for batch in _batches(folder / entry["name"], entry["lines"]))
        with closing(ordered_map(_encode, batches, processes, (tokenizer,))) as results:
            for made in results:
                growing.add(made)
                advance(sum(made.text_bytes))
        growing.finish()
        return growing.tokens - before


def _batches(shard: Path, count: int) -> Iterator[Batch]:
    """The lines of one shard, some at a time: parsing them takes longer than reading."""
    lines: list[tuple[int, bytes]] = []
    size = 0
    for number, line in shards.shard_lines(shard, count):
        if size >= BATCH_BYTES or len(lines) == BATCH_LINES:
            yield Batch(shard, lines, ends=False)
            lines, size = [], 0
        lines.append((number, line))
        size += len(line)
    yield Batch(shard, lines, ends=True)


def _encode(batch: Batch, tokenizer: Tokenizer) -> Encoded:
    dtype = _dtype(tokenizer)
    documents = [shards.written(batch.shard, number, line) for number, line in batch.lines]
    texts = [document["text"] for document in documents]
    ids = [np.array([tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id], dtype) for t in texts]
    return Encoded(
        np.concatenate(ids),
        np.array([len(d) for d in ids], np.uint64),
        [document["meta"]["category"] for document in documents],
        [len(text.encode()) for text in texts],
        batch.ends,
    )
