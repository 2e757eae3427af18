"""The units of a source to one folder of shards a split: whole shards are renamed, the last, shorter ones of units joined."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from openllama.files import read_json

from .documents import Damage
from .journal import changed
from .lines import Unreadable, lines
from .pool import ordered_map
from .shards import MANIFEST, PartWriter, part_name, write_manifest
from .unit import OPEN, Made, Options, Unit


class Slice(NamedTuple):
    """Lines in a row of a shard."""

    path: Path
    first: int
    count: int


class Joined(NamedTuple):
    """A shard to be, in a folder of its own."""

    folder: Path
    slices: list[Slice]


def join(
    folder: Path,
    settings: dict[str, Any],
    options: Options,
    units: Sequence[Unit],
    made: Sequence[Made],
    damage: Damage,
    processes: int,
) -> None:
    """Fills `folder`/train and `folder`/valid. Interrupted, it can be run again: what was renamed is found where it is."""
    size = options.lines_per_shard
    for split in options.splits:
        place = folder / split
        if (place / MANIFEST).exists():
            continue
        place.mkdir(exist_ok=True)
        entries = [(unit.folder / split, e) for unit, m in zip(units, made) for e in m.shards[split]]
        short = [(path, entry) for path, entry in entries if entry["lines"] < size]
        whole = [(path, entry) for path, entry in entries if entry["lines"] == size]
        if len(short) == 1:  # nothing to join it with
            whole.append(short.pop())
        shards = [_renamed(path, entry, place, i) for i, (path, entry) in enumerate(whole)]
        for path in place.iterdir():
            if path.name not in {shard["name"] for shard in shards}:
                path.unlink()
        work = [Joined(folder / f"joined-{split}-{i:05d}", s) for i, s in enumerate(_slices(short, size))]
        made_now = ordered_map(_write, work, max(1, min(processes, len(work))), (size,))
        for entry, joined in zip(made_now, work):
            shards.append(_renamed(joined.folder, entry, place, len(shards)))
        write_manifest(place, shards, damage, settings | {"split": split})


def _renamed(source: Path, entry: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """The shard's entry, under its new number."""
    path = source / entry["name"]
    entry = {**entry, "name": part_name(number)}
    place = folder / entry["name"]
    if path.exists():
        os.replace(path, place)
    if not place.exists() or place.stat().st_size != entry["bytes"]:
        raise changed(path, folder.parent)
    return entry


def _slices(short: Sequence[tuple[Path, dict[str, Any]]], size: int) -> list[list[Slice]]:
    """For each new shard of `size` lines, but for the last, what it is made of."""
    shards: list[list[Slice]] = []
    room = 0
    for folder, entry in short:
        first = 0
        while first < entry["lines"]:
            if not room:
                shards.append([])
                room = size
            count = min(room, entry["lines"] - first)
            shards[-1].append(Slice(folder / entry["name"], first, count))
            first, room = first + count, room - count
    return shards


def _write(joined: Joined, size: int) -> dict[str, Any]:
    """The entry of the shard."""
    shutil.rmtree(joined.folder, ignore_errors=True)  # of a run that was interrupted
    with PartWriter(joined.folder, size) as writer:
        for path, first, count in joined.slices:
            # OPEN lies beside the splits' folders
            counts = read_json(path.parents[1] / OPEN)[path.parent.name][first : first + count]
            for line, (category, text_bytes) in zip(
                islice(lines(path), first, first + count), counts, strict=True
            ):
                if isinstance(line, Unreadable):
                    raise OSError(
                        f"{path}: {line}, though just written; check the disk, remove {path.parents[2]}"
                    )
                writer.write_line(line + b"\n", category, text_bytes)
    return writer.shards[0]
