"""One part of a source to shards of its own, in one process: read, parsed, divided into splits, written.

The last shard of each split is a shorter one; `prepare` joins those of all units.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from openllama.files import write_json

from .documents import Damage, Fields, document
from .journal import TRAIN, VALID, Journal
from .lines import Unreadable
from .pool import stopping
from .progress import ByteCounts
from .shards import MOST_CATEGORIES, PartWriter, encode
from .sources import START, Place, Source

ASKED = 64  # records after which a process asks whether it is to stop
OPEN = "open.json"  # of each split, the category and bytes of text of each line in its last, shorter shard


class Unit(NamedTuple):
    number: int
    source: Source
    folder: Path  # where its shards and its journal lie


class Options(NamedTuple):
    """What holds for all units."""

    fields: Fields
    splits: list[str]
    max_bytes: int | None
    valid_share: float
    on_damage: str
    lines_per_shard: int


class Made(NamedTuple):
    """What a unit gave."""

    shards: dict[str, list[dict[str, Any]]]  # entries of each split's parts
    counts: dict[str, Any]
    before: int  # bytes of text that earlier runs had taken


@dataclass
class Counts:
    """How far a unit has come: all of it is restored when it goes on."""

    damage: Damage
    place: Place = START
    documents: int = 0
    text_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "damage": self.damage.to_dict()}

    @classmethod
    def restored(cls, reached: dict[str, Any], on_damage: str) -> Counts:
        """Those that `to_dict` gave."""
        damage = Damage(on_damage, **reached["damage"])
        return cls(**{**reached, "damage": damage, "place": tuple(reached["place"])})


def fraction(text: str, salt: str = "") -> float:
    """A number in [0, 1) of the text alone: splits and samples by it are stable when a corpus grows."""
    return int.from_bytes(hashlib.sha256(f"{salt}{text}".encode()).digest()[:6], "big") / 2**48


def make(unit: Unit, options: Options, read: ByteCounts) -> Made:
    """The unit's shards, after those that an interrupted run left. `read` counts as `prepare`'s bar does: bytes on the disk,
    or with a limit bytes of text. Raises InterruptedError when the pool is to stop."""

    def advance(count: int) -> None:
        read[unit.number] += count
        _go_on()

    with closing(Journal(unit.folder, options.splits)) as journal:
        if journal.done:
            advance((options.max_bytes and journal.done["counts"]["text_bytes"]) or unit.source.size or 0)
            return Made(**journal.done, before=journal.done["counts"]["text_bytes"])
        before = journal.reached["text_bytes"] if journal.reached else 0
        try:
            shards, counts = _fill(unit, options, journal, advance)
        except BaseException:
            if journal.reached is None:
                shutil.rmtree(unit.folder, ignore_errors=True)  # nothing in it that a later run could use
            raise
        done = {"shards": shards, "counts": counts.to_dict()}
        journal.finish(done)
        return Made(**done, before=before)


def _go_on() -> None:
    if stopping():
        raise InterruptedError


def _fill(
    unit: Unit, options: Options, journal: Journal, advance: Callable[[int], None]
) -> tuple[dict[str, list[dict[str, Any]]], Counts]:
    fields, limit, on_damage = options.fields, options.max_bytes, options.on_damage
    counts = Counts.restored(journal.reached, on_damage) if journal.reached else Counts(Damage(on_damage))
    advance(counts.text_bytes if limit else 0)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(PartWriter(unit.folder / split, options.lines_per_shard, shards))
            for split, shards in journal.shards.items()
        }
        for line in journal.held():
            writers[VALID].write(json.loads(line))
        categories: set[str] = set()
        records = unit.source.records(counts.place, (lambda _: _go_on()) if limit else advance)
        for i, (place, data, category, file) in enumerate(records):
            if i % ASKED == 0:  # of some formats, thousands come between two readings
                _go_on()
            counts.place, number = place, place[1]
            try:
                made = document(data, fields, category, f"{file}:{number}" if number else file)
            except Unreadable as why:
                counts.damage.note(file, number, why)
                continue
            text, category = made["text"], made["meta"]["category"]
            size = len(text.encode())
            if limit is not None and counts.text_bytes + size > limit:
                break
            counts.documents, counts.text_bytes = counts.documents + 1, counts.text_bytes + size
            categories.add(category)
            if len(categories) > MOST_CATEGORIES:
                raise ValueError(
                    f"{unit.source.name}: over {MOST_CATEGORIES:,} categories, takes a key of fewer (a source, a kind of "
                    f"text); got {fields.category!r}"
                )
            line = encode(made)
            if options.valid_share and fraction(text) < options.valid_share:
                journal.hold(len(writers[VALID].shards), line)
                writers[VALID].write_line(line, category, size)
            elif writers[TRAIN].write_line(line, category, size):
                journal.add({split: writer.shards for split, writer in writers.items()}, counts.to_dict())
            advance(size if limit else 0)
        write_json(unit.folder / OPEN, {split: writer.open for split, writer in writers.items()}, indent=None)
    return {split: writer.shards for split, writer in writers.items()}, counts
