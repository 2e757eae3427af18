"""What an interrupted run of `prepare` has completed: a line for each part, so that writing it stays cheap."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openllama.files import file_written_aside

from .shards import differences
from .sources import START, Place

VERSION = 1
JOURNAL = "journal.jsonl"


@dataclass
class Split:
    """The parts of a split that are complete, and the run's counts when the last of them was."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    reached: dict[str, Any] | None = None

    @property
    def place(self) -> Place:
        """Records up to here lie in complete parts, or belong to other splits."""
        return tuple(self.reached["place"]) if self.reached else START  # type: ignore[return-value]


class Journal:
    """The journal in `folder`, whose first line holds the settings. `splits` is what it says.

    Opening it removes what belongs to no complete part. Raises ValueError where the interrupted run had other settings,
    or where a part is not as it left it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], names: list[str]) -> None:
        self.path, self._head = folder / JOURNAL, {"version": VERSION, "settings": settings}
        self.splits = {name: Split() for name in names}
        lines = _whole_lines(self.path)
        if not lines:
            shutil.rmtree(folder, ignore_errors=True)
            return
        if what := differences(lines[0].get("settings", {}), settings):
            raise ValueError(
                f"{folder}: an interrupted run had other settings ({what}); go on with those, or remove the folder"
            )
        if lines[0] != self._head:
            raise ValueError(f"{folder}: an interrupted run of another release; remove the folder")
        for line in lines[1:]:
            split = self.splits[line["split"]]
            split.shards.append(line["shard"])
            split.reached = line["reached"]
        with file_written_aside(self.path) as file:  # without a line that a kill cut off
            file.writelines(map(_line, lines))
        for name, split in self.splits.items():
            _tidy(folder, folder / name, split.shards)

    def add(self, name: str, shard: dict[str, Any], reached: dict[str, Any]) -> None:
        """Notes a part that is complete, and the counts with it."""
        new = not self.path.exists()
        with self.path.open("ab") as file:
            if new:
                file.write(_line(self._head))
            file.write(_line({"split": name, "shard": shard, "reached": reached}))
            file.flush()
            os.fsync(file.fileno())
        self.splits[name].reached = reached


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # the last one, which a kill or a full disk has cut off
            break
    return found


def _tidy(folder: Path, split: Path, shards: list[dict[str, Any]]) -> None:
    sizes = {shard["name"]: shard["bytes"] for shard in shards}
    split.mkdir(exist_ok=True)
    found = {path.name: path.stat().st_size for path in split.iterdir()}
    for name in found.keys() - sizes.keys():
        (split / name).unlink()
    for name, size in sizes.items():
        if found.get(name) != size:
            raise ValueError(
                f"{split / name}: not as the interrupted run left it; remove {folder} to start anew"
            )
