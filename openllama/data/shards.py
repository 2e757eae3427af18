"""Shards: a folder of part-00000.jsonl.zst files with equal line counts, and their manifest.json.

The manifest comes last, so a folder with one is complete. Equal documents and settings give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import zstandard

from openllama.files import check_keys, file_written_aside, read_json, sha256_of, write_json

from .documents import Damage, DamagedData, Document, Fields, document, parse
from .formats import json_lines
from .lines import Advance, Unreadable

if TYPE_CHECKING:
    from typing_extensions import Self

VERSION = 2
MANIFEST = "manifest.json"
LINES_PER_SHARD = 16384
# Each shard's entry in the manifest counts its own, and a token cache numbers them by 16 bits.
MOST_CATEGORIES = 1 << 16
ZSTD_LEVEL = 3  # zstd's default; decompression speed hardly depends on it


class PartWriter:
    """Writes lines to part after part in `folder`; a context manager: an exit through an error leaves no half part.

    With `finished`, entries of parts that an interrupted run completed, it goes on after those.
    """

    def __init__(
        self,
        folder: str | Path,
        lines_per_shard: int = LINES_PER_SHARD,
        finished: Sequence[dict[str, Any]] = (),
    ) -> None:
        if lines_per_shard < 1:
            raise ValueError(f"lines_per_shard: got {lines_per_shard}, takes a whole number of at least 1")
        self.folder, self.lines_per_shard = Path(folder), lines_per_shard
        self.shards = list(finished)  # entries of the parts that are complete
        self.open: list[
            tuple[str, int]
        ] = []  # category and bytes of text of each line in the part being written
        self._part = ExitStack()  # holds that part
        known = {MANIFEST, *(shard["name"] for shard in self.shards)}
        if self.folder.exists() and any(p.name not in known for p in self.folder.iterdir()):
            raise FileExistsError(
                f"{self.folder}: takes a new or empty folder for shards; remove it or name another"
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, document: Document) -> bool:
        """Whether this document completed a part."""
        return self.write_line(encode(document), document["meta"]["category"], len(document["text"].encode()))

    def write_line(self, line: bytes, category: str, text_bytes: int) -> bool:
        """`write` of what `encode` gave, for a caller that has the line already."""
        if not self.open:
            self._begin()
        self._put(self._zstd.compress(line))
        self.open.append((category, text_bytes))
        if len(self.open) < self.lines_per_shard:
            return False
        self._close()
        return True

    def finish(self) -> None:
        """Completes the part being written, which may be a shorter one."""
        if self.open:
            with self._part:  # so that an error of the last flush removes the part too
                self._close()

    def _begin(self) -> None:
        self._name = part_name(len(self.shards))
        self._file = self._part.enter_context(file_written_aside(self.folder / self._name))
        # threads=1: beside the caller
        self._zstd = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True, threads=1).compressobj()
        self._sha, self._bytes = hashlib.sha256(), 0

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self._bytes += len(data)

    def _close(self) -> None:
        self._put(self._zstd.flush())
        self._part.close()
        categories: dict[str, dict[str, int]] = {}
        for category, text_bytes in self.open:
            counts = categories.setdefault(category, {"lines": 0, "text_bytes": 0})
            counts["lines"] += 1
            counts["text_bytes"] += text_bytes
        entry = {
            "name": self._name,
            "lines": len(self.open),
            "bytes": self._bytes,
            "sha256": self._sha.hexdigest(),
            "categories": dict(sorted(categories.items())),
        }
        self.shards.append(entry)
        self.open = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._part.__exit__(kind, error, trace)
        else:
            self.finish()


class ShardWriter(PartWriter):
    """Writes documents to `folder`; used as a context manager, which on a clean exit writes the manifest.

    `settings` is stored in the manifest and decides whether a later run may reuse the folder. An exit without any
    document raises ValueError; an exit through an error leaves no half-written part and no manifest.
    """

    def __init__(
        self, folder: str | Path, settings: dict[str, Any], lines_per_shard: int = LINES_PER_SHARD
    ) -> None:
        super().__init__(folder, lines_per_shard)
        self.settings = settings

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        if error is None:
            write_manifest(self.folder, self.shards, Damage(), self.settings)


def write_manifest(
    folder: Path, shards: list[dict[str, Any]], damage: Damage, settings: dict[str, Any]
) -> None:
    """Completes a folder that holds `shards`. Raises ValueError where there are none."""
    if not shards:
        raise ValueError(f"{folder}: the corpus is empty, takes at least one document")
    categories = _add_up(shard["categories"] for shard in shards)
    manifest = {
        "version": VERSION,
        "lines": sum(shard["lines"] for shard in shards),
        "text_bytes": sum(counts["text_bytes"] for counts in categories.values()),
        "shards": shards,
        "categories": categories,
        "damage": damage.to_dict(),
        "settings": settings,
    }
    write_json(folder / MANIFEST, manifest)


def part_name(number: int) -> str:
    """The file of a shard, by its number from 0."""
    return f"part-{number:05d}.jsonl.zst"


def encode(document: Document) -> bytes:
    """The line of a document in a shard."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _add_up(parts: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for part in parts:
        for category, counts in part.items():
            sums = total.setdefault(category, {"lines": 0, "text_bytes": 0})
            for name, count in counts.items():
                sums[name] += count
    return dict(sorted(total.items()))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a complete shard folder, its files checked for presence and size."""
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(
            f"{folder}: no {MANIFEST}; takes a folder that train/prepare_data.py finished"
        )
    manifest = read_json(
        folder / MANIFEST, VERSION, ("lines", "text_bytes", "shards", "categories", "damage", "settings")
    )
    for shard in manifest["shards"]:
        check_keys(folder / MANIFEST, shard, ("name", "lines", "bytes", "sha256", "categories"))
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
    """The documents of a shard folder, in order.

    The manifest is checked at once; damage raises DamagedData naming its file and line.
    """
    entries = read_manifest(folder)["shards"]
    return (document for entry in entries for document in read_shard(Path(folder), entry))


def read_shard(folder: Path, entry: dict[str, Any], advance: Advance = lambda _: None) -> Iterator[Document]:
    """The documents of one shard, by its entry in the manifest; `advance` is told the bytes read of its file."""
    path = folder / entry["name"]
    return (written(path, number, line) for number, line in shard_lines(path, entry["lines"], advance))


def shard_lines(path: Path, count: int, advance: Advance = lambda _: None) -> Iterator[tuple[int, bytes]]:
    """The `count` lines of a shard with their numbers, which `written` reads, perhaps in another process."""
    number = 0
    for number, line in json_lines(path, advance):
        if not isinstance(line, bytes):
            raise _damaged(path, number, line)
        yield number, line
    if number != count:
        raise DamagedData(f"{path}: ends after line {number}, {MANIFEST} says {count}; make the folder again")


_FIELDS = Fields(("text",), "meta.category")


def written(path: Path, number: int, line: bytes) -> Document:
    """The document of a line that `encode` made. Raises DamagedData."""
    try:
        document(record := parse(line), _FIELDS, "", "")  # raises where something is missing
    except Unreadable as why:
        raise _damaged(path, number, why) from None
    return record


def _damaged(path: Path, number: int, why: object) -> DamagedData:
    return DamagedData(f"{path}, line {number}: {why}; make the folder again")


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
    if what := differences(manifest["settings"], settings):
        raise ValueError(
            f"{folder}: holds shards made with other settings ({what}); remove it or name another folder"
        )
    return manifest


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What settings differ, in words; empty where none do."""
    keys = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    return "; ".join(f"{k} was {old.get(k)!r}, now {new.get(k)!r}" for k in keys)
