"""What an interrupted run has completed of a unit: a line for each training part, so that writing it stays cheap.

A line says which parts are complete and how far the run had come. At that moment no training part is open; the lines of
the held-out part that is open lie in a file beside, so that the run goes on from there however rare held-out documents are. The last line says that the unit is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from openllama.files import file_written_aside

from .shards import part_name

JOURNAL = "journal.jsonl"
TRAIN, VALID = "train", "valid"


class Journal:
    """The journal in `folder`, of the parts in its folders `splits`.

    `shards` are the complete parts of each split, `reached` the counts when the last training part was complete, None
    at the start; `done` what `finish` was given. Opening it removes what belongs to no complete part. Raises ValueError
    where a part is not as the interrupted run left it.
    """

    def __init__(self, folder: Path, splits: list[str]) -> None:
        self.folder, self.path = folder, folder / JOURNAL
        self.shards: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
        self.reached: dict[str, Any] | None = None
        self.done: dict[str, Any] | None = None
        self._held: BinaryIO | None = None
        self._part = 0  # of the held-out documents in `_held`
        lines = _whole_lines(self.path)
        if not lines:
            shutil.rmtree(folder, ignore_errors=True)
            return
        self.done = lines[-1].get("done")
        if self.done:
            return
        for line in lines:
            for split, added in line["shards"].items():
                self.shards[split] += added
            self.reached = line["reached"]
        with file_written_aside(self.path) as file:  # without a line that a kill cut off
            file.writelines(map(_line, lines))
        for split, shards in self.shards.items():
            self._tidy(split, shards)
        self._open_held(lines[-1].get("held", {}))

    def _tidy(self, split: str, shards: list[dict[str, Any]]) -> None:
        folder = self.folder / split
        folder.mkdir(exist_ok=True)
        found = {path.name: path.stat().st_size for path in folder.iterdir()}
        for name in found.keys() - {shard["name"] for shard in shards}:
            (folder / name).unlink()
        for i, shard in enumerate(shards):
            if shard["name"] != part_name(i) or found.get(shard["name"]) != shard["bytes"]:
                raise changed(folder / shard["name"], self.folder.parent)

    # ------------------------------------------------------------ held-out documents of the open part

    def _open_held(self, held: dict[str, int]) -> None:
        kept = None
        if held and held["part"] == len(self.shards[VALID]):
            self._part = held["part"]
            kept = self._held_path(self._part)
            if not kept.exists() or kept.stat().st_size < held["bytes"]:
                raise changed(kept, self.folder.parent)
            self._held = kept.open("r+b")
            self._held.truncate(held["bytes"])
        self._remove_held(kept)

    def _held_path(self, part: int | str) -> Path:
        return self.folder / f"held-{part}.jsonl"

    def _remove_held(self, kept: Path | None) -> None:
        for path in self.folder.glob(self._held_path("*").name):
            if path != kept:
                path.unlink()

    def held(self) -> Iterator[bytes]:
        """The lines of the held-out part that was open. All must be taken before the next `hold`."""
        yield from self._held or ()

    def hold(self, part: int, line: bytes) -> None:
        """Keeps a line of the held-out part number `part` until a training part is complete, or a later run needs it."""
        if self._held is None or part != self._part:
            self.close()
            self._held, self._part = self._held_path(part).open("wb"), part
        self._held.write(line)

    def close(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    # ------------------------------------------------------------ complete parts

    def add(self, shards: dict[str, list[dict[str, Any]]], reached: dict[str, Any]) -> None:
        """Notes all parts that are complete, when that of the training split just became so."""
        added = {split: parts[len(self.shards[split]) :] for split, parts in shards.items()}
        line = {"shards": added, "reached": reached}
        if self._held is not None:
            _sync(self._held)
            line["held"] = {"part": self._part, "bytes": self._held.tell()}
        self._append(line)
        self.shards = {split: list(parts) for split, parts in shards.items()}
        self.reached = reached
        self._remove_held(self._held_path(self._part))

    def finish(self, done: dict[str, Any]) -> None:
        """Notes that the unit is complete."""
        self._append({"done": done})
        self.close()
        self._remove_held(None)

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(_line(line))
            _sync(file)


def changed(path: Path, folder: Path) -> ValueError:
    """The error of a part that an interrupted run made, in its `folder`."""
    return ValueError(f"{path}: not as the interrupted run left it; remove {folder} to start anew")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


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
