"""The token cache: a shard folder tokenised once, in parallel, and opened by memory map.

tokens.bin holds every document as bos, ids, eos; offsets.npy (uint64) where each starts, and the end;
cache.json, written last, says what it was made from.
"""

from __future__ import annotations

import hashlib
import os
import sys
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from openllama.files import file_written_aside, read_json, write_json
from openllama.tokenizer import Tokenizer

from . import shards
from .progress import bar

VERSION = 1
TOKENS, OFFSETS, INDEX = "tokens.bin", "offsets.npy", "cache.json"
# Handed to a worker at once: characters of text, and at most so many texts. Small enough that memory stays
# flat, large enough to hide the hand-over.
BATCH_CHARACTERS, BATCH_TEXTS = 1 << 18, 256
# Of text, at least: a process takes as long to start as it needs for about this much.
BYTES_PER_PROCESS = 8 << 20

_KEYS = ("tokens", "documents", "text_bytes", "vocab_size", "pad_id", "fingerprint", "dtype")
_MADE_FROM = ("tokenizer", "shards")  # compared by `tokenize` only

Encoded = tuple[np.ndarray, np.ndarray, int]  # ids of all documents, length of each, bytes of their text


class TokenCache:
    """A finished cache. `cache[i]` are the ids of document i (a view of the file); `lengths` those of all.

    Also `tokens`, `text_bytes`, `vocab_size`, `pad_id`, and `fingerprint`, which stands for the tokens'
    content.
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
        dtype = np.dtype(self.meta["dtype"])
        self._expect(TOKENS, self.tokens * dtype.itemsize)
        try:
            self.offsets: np.ndarray = np.load(self.path / OFFSETS, mmap_mode="r").view(np.ndarray)
        except (OSError, ValueError, EOFError) as e:
            raise ValueError(f"{self.path / OFFSETS}: cannot be read ({e}); {_AGAIN}") from None
        if len(self.offsets) != self.meta["documents"] + 1 or self.offsets[-1] != self.tokens:
            raise ValueError(f"{self.path / OFFSETS}: does not fit {INDEX}; {_AGAIN}")
        # A plain view: indexing numpy's memmap class itself is slower.
        self.ids: np.ndarray = np.memmap(self.path / TOKENS, dtype, mode="r").view(np.ndarray)  # (tokens,)

    def _expect(self, name: str, size: int) -> None:
        path = self.path / name
        got = path.stat().st_size if path.exists() else "no such file"
        if got != size:
            raise ValueError(f"{path}: {INDEX} says {size} bytes, got {got}; {_AGAIN}")

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
    rebuild: bool = False,
    progress: bool = True,
) -> TokenCache:
    """Tokenises a shard folder into `out_dir`, or opens what the same shards and tokenizer gave before.

    `processes`: default one per core, fewer for a small corpus; the result does not depend on it. A cache
    made from other shards or another tokenizer raises ValueError, or is made anew with `rebuild=True`. Empty
    documents are left out.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes: got {processes}, takes a whole number of at least 1, or None to choose")
    manifest = shards.read_manifest(shards_dir)
    out, made_from = Path(out_dir), _made_from(shards_dir, tokenizer)
    if (out / INDEX).exists():
        if not (stale := _differences(read_json(out / INDEX, VERSION, _MADE_FROM), made_from)):
            return TokenCache(out)
        if not rebuild:
            raise ValueError(f"{out}: made from {stale}; remove {out}, or choose another `out`")
        (out / INDEX).unlink()  # first, so that a kill from here on leaves no cache rather than a wrong one
    processes = processes or min(cores(), 1 + manifest["text_bytes"] // BYTES_PER_PROCESS)
    out.mkdir(parents=True, exist_ok=True)
    texts = (document["text"] for document in shards.read_shards(shards_dir))
    with bar("tokenising", manifest["text_bytes"], progress) as advance:
        counts = _write(out, made_from["dtype"], _encode_all(_batches(texts), tokenizer, processes), advance)
    if not counts["documents"]:
        raise ValueError(
            f"{shards_dir}: all of its {manifest['lines']} documents are empty, takes some with text"
        )
    write_json(out / INDEX, {"version": VERSION, **made_from, **counts})
    return TokenCache(out)


def cores() -> int:
    """Cores this process may use; os.cpu_count() would ignore a container's CPU set."""
    return len(os.sched_getaffinity(0))


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


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts if text]
    ids = np.concatenate([np.array(d, dtype) for d in documents]) if documents else np.zeros(0, dtype)
    return ids, np.array([len(d) for d in documents], np.uint64), sum(len(text.encode()) for text in texts)


def _encode_all(batches: Iterator[list[str]], tokenizer: Tokenizer, processes: int) -> Iterator[Encoded]:
    if processes == 1:
        yield from (_encode(tokenizer, batch) for batch in batches)
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (tokenizer.path,))
    # bounded: reading never runs far ahead; and in the documents' order
    waiting: deque[Future[Encoded]] = deque()
    with _no_main_module(), pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(_work, batch))
                if len(waiting) > 4 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(path: Path) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(path)


def _work(texts: list[str]) -> Encoded:
    return _encode(_tokenizer, texts)


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Spawned workers would first run the caller's script again (its imports cost seconds each, and one
    without a `__main__` guard would start over); they need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _write(
    out: Path, dtype: str, results: Iterable[Encoded], advance: Callable[[int], None]
) -> dict[str, int]:
    offsets, text_bytes = array("Q", [0]), 0
    with file_written_aside(out / TOKENS) as file:
        for ids, lengths, size in results:
            file.write(ids.astype(dtype, copy=False).tobytes())
            offsets.extend((np.cumsum(lengths, dtype=np.uint64) + np.uint64(offsets[-1])).tolist())
            text_bytes += size
            advance(size)
    with file_written_aside(out / OFFSETS) as file:
        np.save(file, np.frombuffer(offsets, np.uint64))
    return {"documents": len(offsets) - 1, "tokens": offsets[-1], "text_bytes": text_bytes}
