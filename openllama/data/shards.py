"""Shards: a folder of part-00000.jsonl.zst files with equal line counts, and their manifest.json.

The manifest comes last, so a folder with one is complete. Equal documents and settings give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import zstandard

from openllama.files import check_keys, file_written_aside, read_json, sha256_of, write_json

from .lines import Unreadable
from .readers import Damage, DamagedData, Document, records

VERSION = 1
MANIFEST = "manifest.json"
LINES_PER_SHARD = 16384
ZSTD_LEVEL = 3  # zstd's default; decompression speed hardly depends on it


class ShardWriter:
    """Writes documents to `folder`; used as a context manager, which on a clean exit writes the manifest.

    `settings` is stored in the manifest and decides whether a later run may reuse the folder. An exit without
    any document raises ValueError; an exit through an error leaves no half-written part and no manifest.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        lines_per_shard: int = LINES_PER_SHARD,
        damage: Damage | None = None,
    ) -> None:
        if lines_per_shard < 1:
            raise ValueError(f"lines_per_shard: got {lines_per_shard}, takes a whole number of at least 1")
        self.folder, self.settings, self.damage = Path(folder), settings, damage or Damage()
        self.lines_per_shard = lines_per_shard
        self.manifest: dict[str, Any] = {}
        self._shards: list[dict[str, Any]] = []
        self._categories: Counter[str] = Counter()
        self._lines = self._text_bytes = self._total_lines = 0
        self._part = ExitStack()  # holds the part being written
        if self.folder.exists() and any(self.folder.iterdir()):
            raise FileExistsError(
                f"{self.folder}: takes a new or empty folder for shards; remove it or name another"
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, document: Document) -> None:
        if not self._lines:
            self._open()
        line = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._put(self._zstd.compress(line))
        self._lines += 1
        self._text_bytes += len(document["text"].encode())
        self._categories[document["meta"]["source"]] += 1
        if self._lines == self.lines_per_shard:
            self._close()

    def _open(self) -> None:
        self._name = f"part-{len(self._shards):05d}.jsonl.zst"
        self._file = self._part.enter_context(file_written_aside(self.folder / self._name))
        self._zstd = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compressobj()
        self._sha, self._bytes = hashlib.sha256(), 0

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self._bytes += len(data)

    def _close(self) -> None:
        self._put(self._zstd.flush())
        self._part.close()
        entry = {
            "name": self._name,
            "lines": self._lines,
            "bytes": self._bytes,
            "sha256": self._sha.hexdigest(),
        }
        self._shards.append(entry)
        self._total_lines += self._lines
        self._lines = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._part.__exit__(kind, error, trace)
            return
        if self._lines:
            with self._part:  # so that an error of the last flush removes the part too
                self._close()
        if not self._shards:
            counts = self.damage.to_dict()["counts"] or "none"
            raise ValueError(
                f"{self.folder}: the corpus is empty (settings: {self.settings}; skipped: {counts}); "
                "give a source with text, a larger max_bytes or another valid_share"
            )
        self.manifest = {
            "version": VERSION,
            "lines": self._total_lines,
            "text_bytes": self._text_bytes,
            "shards": self._shards,
            "categories": dict(sorted(self._categories.items())),
            "damage": self.damage.to_dict(),
            "settings": self.settings,
        }
        write_json(self.folder / MANIFEST, self.manifest)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a complete shard folder, its files checked for presence and size."""
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(
            f"{folder}: no {MANIFEST}; takes a folder that train/prepare_data.py finished"
        )
    manifest = read_json(folder / MANIFEST, VERSION, ("lines", "text_bytes", "shards", "damage", "settings"))
    for shard in manifest["shards"]:
        check_keys(folder / MANIFEST, shard, ("name", "lines", "bytes", "sha256"))
        path = folder / shard["name"]
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing, but {MANIFEST} lists it; make the folder again")
        if path.stat().st_size != shard["bytes"]:
            raise ValueError(
                f"{path}: has {path.stat().st_size} bytes, {MANIFEST} says {shard['bytes']}; "
                "make the folder again"
            )
    return manifest


def read_shards(folder: str | Path) -> Iterator[Document]:
    """All documents of a shard folder, in order. The manifest is checked at once; damage raises DamagedData
    naming its file and line."""
    return _documents(Path(folder), read_manifest(folder))


def _documents(folder: Path, manifest: dict[str, Any]) -> Iterator[Document]:
    for shard in manifest["shards"]:
        path, number = folder / shard["name"], 0
        for number, record in records(path):
            if isinstance(record, Unreadable):
                raise DamagedData(f"{path}, line {number}: {record}; make the folder again")
            else:
                yield record
        if number != shard["lines"]:
            raise DamagedData(
                f"{path}: ends after line {number}, {MANIFEST} says {shard['lines']}; make the folder again"
            )


def fingerprint(folder: str | Path) -> str:
    """Stands for the whole content: the manifest holds the sha256 of every shard."""
    return sha256_of(Path(folder) / MANIFEST)


def reusable(folder: str | Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of `folder` if it was made with `settings`, None if it is new or empty; else raises."""
    folder = Path(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder}: holds files but no {MANIFEST}; remove it or name another folder")
    manifest = read_manifest(folder)
    old = manifest["settings"]
    differing = [k for k in sorted({*old, *settings}) if old.get(k) != settings.get(k)]
    if differing:
        what = "; ".join(f"{k} was {old.get(k)!r}, now {settings.get(k)!r}" for k in differing)
        raise ValueError(
            f"{folder}: holds shards made with other settings ({what}); remove it or name another folder"
        )
    return manifest
