"""A source of text to training and held-out shards: read and written here, parsed and checked by other processes.

Whatever completes a shard is noted in `.unfinished/journal.jsonl`, so that a run that was interrupted goes on from
there, to the same bytes.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .documents import Damage, Fields, document
from .journal import Journal, Split
from .lines import Unreadable
from .pool import ordered_map, process_count
from .progress import bar
from .shards import LINES_PER_SHARD, MANIFEST, ShardWriter, encode, reusable
from .sources import PYTHON, START, Place, Record, Source, open_source

UNFINISHED = ".unfinished"  # shards are made there and renamed when all are complete
# Handed to a process at once: large enough to hide the hand-over, small enough that memory stays flat.
BATCH_BYTES, BATCH_RECORDS = 1 << 20, 1024
BYTES_PER_PROCESS = (
    32 << 20
)  # of the source: a process takes as long to start as it needs for about this much


class Corpus(NamedTuple):
    """A published data set: its keys, and how many lines Open-Llama's preparation made of the whole of it."""

    fields: Fields
    lines: int


CORPORA = {
    "pile": Corpus(Fields(("text",), "meta.pile_set_name"), 210_607_728),
    "wudao": Corpus(Fields(("title", "content"), "dataType"), 59_132_213),
}


class Prepared(NamedTuple):
    """What a process makes of a record: a shard's line, or why there is none."""

    place: Place
    line: bytes | Unreadable
    category: str
    text_bytes: int
    fraction: float  # which decides between training and held-out
    file: str


@dataclass
class Counts:
    """How far a run has come: all of it is restored when it goes on."""

    damage: Damage
    place: Place = START
    documents: int = 0
    text_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "damage": self.damage.to_dict()}


def fraction(text: str, salt: str = "") -> float:
    """A number in [0, 1) of the text alone: splits and samples by it are stable when a corpus grows."""
    return int.from_bytes(hashlib.sha256(f"{salt}{text}".encode()).digest()[:6], "big") / 2**48


def prepare(
    source: str | Path,
    out: str | Path,
    max_bytes: int | None = None,
    valid_share: float = 0.02,
    *,
    fields: Fields = Fields(),  # noqa: B008 frozen
    on_damage: str = "skip",
    lines_per_shard: int = LINES_PER_SHARD,
    processes: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes `out`/train and, unless `valid_share` is 0, `out`/valid; returns what was made.

    Takes documents in order up to the first that would exceed `max_bytes` of UTF-8 text. A document is held
    out if the hash of its text falls below `valid_share`. Shards made before with equal settings are reused,
    unfinished ones completed; others raise. The result does not depend on `processes` (default: one per core, fewer
    for a small source).

    Args:
        source: see `sources.open_source`.
        fields: the keys of text and category in a record.
        on_damage: "skip" counts what cannot be used, with examples, in the manifest; "raise" stops at the first.

    Returns:
        {"reused", "train", "valid" (manifests; valid is None at share 0), "documents", "text_bytes", "seconds"}.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes: got {max_bytes}, takes a whole number of at least 1, or None for all")
    if not 0 <= valid_share < 1:
        raise ValueError(f"valid_share: got {valid_share}, takes a number from 0 to below 1")
    opened, out, start = open_source(source, fields), Path(out), time.perf_counter()
    settings = {
        "source": opened.name,
        "source_bytes": opened.size,
        "source_fingerprint": opened.fingerprint,
        "text_keys": list(fields.text),
        "category_key": fields.category,
        "max_bytes": max_bytes,
        "valid_share": valid_share,
        # Python ships files that can't be decoded
        "on_damage": "skip" if opened.name == PYTHON else on_damage,
        "lines_per_shard": lines_per_shard,
    }
    splits = ["train", "valid"] if valid_share else ["train"]
    manifests = _complete(out, splits, settings)
    if not (reused := bool(manifests)):
        work = min(size for size in (max_bytes, opened.size, 1 << 62) if size is not None)
        processes = process_count(processes, work, BYTES_PER_PROCESS)
        _write(opened, fields, out, splits, settings, processes, progress)
        manifests = _complete(out, splits, settings)
    made = list(manifests.values())
    return {
        "reused": reused,
        "train": manifests["train"],
        "valid": manifests.get("valid"),
        "documents": sum(m["lines"] for m in made),
        "text_bytes": sum(m["text_bytes"] for m in made),
        "seconds": time.perf_counter() - start,
    }


def _complete(out: Path, splits: list[str], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifests, once each split is complete: what still lies in the unfinished folder then takes its place."""
    found = {}
    for split in splits:
        aside = out / UNFINISHED / split
        place = aside if (aside / MANIFEST).exists() else out / split
        found[split] = place, reusable(place, settings | {"split": split})
    if not all(manifest for _, manifest in found.values()):
        return {}
    for split, (place, _) in found.items():
        if place != out / split:
            # empty, else `reusable` would have found or refused it
            shutil.rmtree(out / split, ignore_errors=True)
            os.replace(place, out / split)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return {split: manifest for split, (_, manifest) in found.items() if manifest}


def _write(
    source: Source,
    fields: Fields,
    out: Path,
    splits: list[str],
    settings: dict[str, Any],
    processes: int,
    progress: bool,
) -> None:
    folder = out / UNFINISHED
    for split in splits:  # an older result that cannot be reused is an error before any work
        reusable(out / split, settings | {"split": split})
    journal = Journal(folder, settings, splits)
    try:
        _fill(source, fields, folder, journal, settings, processes, progress)
    except BaseException:
        if not journal.path.exists():
            shutil.rmtree(folder, ignore_errors=True)  # nothing in it that a later run could use
        raise


def _fill(
    source: Source,
    fields: Fields,
    folder: Path,
    journal: Journal,
    settings: dict[str, Any],
    processes: int,
    progress: bool,
) -> None:
    limit, share = settings["max_bytes"], settings["valid_share"]
    counts = _restore(journal.splits, settings["on_damage"])
    with ExitStack() as stack:
        advance = stack.enter_context(bar(f"reading {source.name}", limit or source.size, progress))
        advance(counts.text_bytes if limit else 0)
        writers = {
            name: stack.enter_context(
                ShardWriter(
                    folder / name,
                    settings | {"split": name},
                    settings["lines_per_shard"],
                    counts.damage,
                    split.shards,
                    processes,
                )
            )
            for name, split in journal.splits.items()
        }
        records = source.records(counts.place, (lambda _: None) if limit else advance)
        results = ordered_map(_prepare, _batches(records), processes, (fields,))
        stack.callback(results.close)
        for made in (made for batch in results for made in batch):
            counts.place = made.place
            if isinstance(made.line, Unreadable):
                counts.damage.note(made.file, made.place[1], made.line)
                continue
            if limit is not None and counts.text_bytes + made.text_bytes > limit:
                break
            counts.documents, counts.text_bytes = counts.documents + 1, counts.text_bytes + made.text_bytes
            name = "valid" if made.fraction < share else "train"
            writer, complete = writers[name], journal.splits[name].place
            if made.place > complete and writer.write_line(made.line, made.category, made.text_bytes):
                journal.add(name, writer.shards[-1], counts.to_dict())
            advance(made.text_bytes if limit else 0)
        _check_not_empty(source, folder, writers, counts, share)


def _restore(splits: dict[str, Split], on_damage: str) -> Counts:
    """The counts at the earliest place from which some split still lacks documents."""
    first = min(splits.values(), key=lambda split: split.place)
    if first.reached is None:
        return Counts(Damage(on_damage))
    damage = Damage(on_damage, **copy.deepcopy(first.reached["damage"]))  # the journal's stays as it is
    return Counts(**{**first.reached, "damage": damage, "place": first.place})


def _check_not_empty(
    source: Source,
    folder: Path,
    writers: dict[str, ShardWriter],
    counts: Counts,
    share: float,
) -> None:
    if not counts.documents:
        skipped = ", ".join(f"{n:,} x {reason}" for reason, n in sorted(counts.damage.counts.items()))
        raise ValueError(
            f"{source.name}: no document was taken of it (skipped: {skipped or 'none'}); "
            "give a source with text, other keys, or a larger max_bytes"
        )
    if empty := [name for name, writer in writers.items() if writer.empty]:
        raise ValueError(
            f"{folder.parent / empty[0]}: none of the source's {counts.documents:,} documents fell into it at "
            f"valid_share={share} (a document is chosen by its hash); give more documents, another valid_share, or 0 to "
            "hold out none"
        )


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.data) if isinstance(record.data, (bytes, str)) else 1 << 12  # a row: some pages
        if size >= BATCH_BYTES or len(batch) == BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _prepare(batch: Sequence[Record], fields: Fields) -> list[Prepared]:
    return [_prepare_one(record, fields) for record in batch]


def _prepare_one(record: Record, fields: Fields) -> Prepared:
    number, path = record.place[1], record.file
    try:
        made = document(record.data, fields, record.category, f"{path}:{number}" if number else path)
    except Unreadable as why:
        return Prepared(record.place, why, "", 0, 0.0, path)
    text = made["text"]
    return Prepared(
        record.place, encode(made), made["meta"]["category"], len(text.encode()), fraction(text), path
    )
