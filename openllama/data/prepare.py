"""A source of text to training and held-out shards."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .progress import bar
from .readers import Damage, Document, read, source_files
from .shards import LINES_PER_SHARD, ShardWriter, read_manifest, read_shards, reusable

UNFINISHED = ".unfinished"  # shards are made here and renamed when all are complete
ENDS = 1 << 16  # bytes of each end of a source's file that are compared when shards are reused


def fraction(text: str, salt: str = "") -> float:
    """A number in [0, 1) of the text alone: splits and samples by it are stable when a corpus grows."""
    return int.from_bytes(hashlib.sha256(f"{salt}{text}".encode()).digest()[:6], "big") / 2**48


def prepare(
    source: str | Path,
    out: str | Path,
    max_bytes: int | None = None,
    valid_share: float = 0.02,
    *,
    on_damage: str = "skip",
    lines_per_shard: int = LINES_PER_SHARD,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes `out`/train and, unless `valid_share` is 0, `out`/valid; returns what was made.

    Takes documents in order up to the first that would exceed `max_bytes` of UTF-8 text. A document is held
    out if the hash of its text falls below `valid_share`. Shards made before with equal settings are reused;
    others raise. Returns {"reused", "train", "valid" (manifests; valid is None at share 0), "documents",
    "text_bytes", "seconds"}.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes: got {max_bytes}, takes a whole number of at least 1, or None for all")
    if not 0 <= valid_share < 1:
        raise ValueError(f"valid_share: got {valid_share}, takes a number from 0 to below 1")
    out, start = Path(out), time.perf_counter()
    settings = _settings(source, max_bytes, valid_share, on_damage, lines_per_shard)
    splits = ["train", "valid"] if valid_share else ["train"]
    manifests = {s: reusable(out / s, settings | {"split": s}) for s in splits}
    reused = all(manifests.values())
    if not reused:
        manifests = _write(source, out, settings, splits, Damage(on_damage), progress)
    made = [m for m in manifests.values() if m]
    return {
        "reused": reused,
        "train": manifests["train"],
        "valid": manifests.get("valid"),
        "documents": sum(m["lines"] for m in made),
        "text_bytes": sum(m["text_bytes"] for m in made),
        "seconds": time.perf_counter() - start,
    }


def _settings(
    source: str | Path, max_bytes: int | None, valid_share: float, on_damage: str, lines_per_shard: int
) -> dict[str, Any]:
    # The files, so that a changed source is noticed. Not for "python": installing a package must not
    # invalidate shards.
    files = [] if str(source) == "python" else source_files(source)
    return {
        "source": str(source),
        "source_bytes": sum(p.stat().st_size for p in files) if files else None,
        "source_fingerprint": _fingerprint(files) if files else None,
        "max_bytes": max_bytes,
        "valid_share": valid_share,
        "on_damage": on_damage,
        "lines_per_shard": lines_per_shard,
    }


def _fingerprint(files: list[Path]) -> str:
    """Stands for the files' names, sizes, and first and last bytes: cheap for a corpus of any size."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(ENDS, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()[:16]


def _write(
    source: str | Path, out: Path, settings: dict[str, Any], splits: list[str], damage: Damage, progress: bool
) -> dict[str, dict[str, Any] | None]:
    unfinished = out / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        manifests = _fill(source, unfinished, settings, splits, damage, progress)
        for split in reversed(splits):  # train last: after a kill in between, the next run makes both again
            if (out / split).exists():
                # empty, or complete with equal settings: `reusable` has seen to that
                shutil.rmtree(out / split)
            os.replace(unfinished / split, out / split)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifests


def _fill(
    source: str | Path,
    folder: Path,
    settings: dict[str, Any],
    splits: list[str],
    damage: Damage,
    progress: bool,
) -> dict[str, dict[str, Any] | None]:
    limit, share = settings["max_bytes"], settings["valid_share"]
    with ExitStack() as stack:
        advance = stack.enter_context(bar(f"reading {source}", limit or settings["source_bytes"], progress))
        writers = {
            s: stack.enter_context(
                ShardWriter(folder / s, settings | {"split": s}, settings["lines_per_shard"], damage)
            )
            for s in splits
        }
        count, text_bytes = dict.fromkeys(splits, 0), 0
        for document, size in _up_to(read(source, damage=damage), limit):
            split = "valid" if fraction(document["text"]) < share else "train"
            writers[split].write(document)
            count[split] += 1
            text_bytes += size
            advance(size)
        total = sum(count.values())
        if total and not text_bytes:
            raise ValueError(f"{source}: its {total:,} documents hold no text; give a source with text")
        if total and (empty := [s for s in splits if not count[s]]):
            raise ValueError(
                f"{folder.parent / empty[0]}: none of the source's {total:,} documents fell into it at valid_share={share} "
                "(a document is chosen by its hash); give more documents, another valid_share, or 0 to hold out none"
            )
    return {s: w.manifest for s, w in writers.items()}


def _up_to(documents: Iterator[Document], limit: int | None) -> Iterator[tuple[Document, int]]:
    total = 0
    for document in documents:
        size = len(document["text"].encode())
        total += size
        if limit is not None and total > limit:
            return
        yield document, size


def sample(folder: str | Path, max_bytes: int) -> Iterator[str]:
    """Texts of a shard folder, about `max_bytes` of them by hash: spread evenly, the same every time."""
    share = max_bytes / read_manifest(folder)["text_bytes"]
    return (d["text"] for d in read_shards(folder) if share >= 1 or fraction(d["text"], "sample") < share)
