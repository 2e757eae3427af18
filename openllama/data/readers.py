"""Sources of text: each is read as a stream of documents {"text": str, "meta": {"source": ..., "path": ...}}.

A line is the largest unit held in memory. Damage is counted with file and line, or raised.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .lines import Unreadable, lines

Document = dict[str, Any]

JSON_LINES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
SUFFIXES = (*JSON_LINES, ".txt")
EXAMPLES = 20  # damage kept with file and line; the rest is only counted


class DamagedData(ValueError):
    """A file or a line that cannot be used; the message names both."""


@dataclass
class Damage:
    """What was skipped, per reason, with the first examples. `policy` "raise" stops at the first instead."""

    policy: str = "skip"
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.policy not in ("skip", "raise"):
            raise ValueError(f"on_damage: got {self.policy!r}, takes 'skip' (count and go on) or 'raise'")

    def note(self, file: str | Path, line: int, why: Unreadable) -> None:
        """Counts one damaged place; line 0 means the file as a whole."""
        if self.policy == "raise":
            place = f"{file}, line {line}" if line else str(file)
            raise DamagedData(
                f"{place}: {why}; repair or remove it, or pass on_damage='skip' to count it and go on"
            )
        self.counts[why.reason] = self.counts.get(why.reason, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append({"file": str(file), "line": line, "reason": why.reason})

    def to_dict(self) -> dict[str, Any]:
        return {"counts": dict(sorted(self.counts.items())), "examples": self.examples}


def read(source: str | Path, key: str = "text", damage: Damage | None = None) -> Iterator[Document]:
    """Documents of `source`: `python` (the Python source on this machine: standard library, then installed
    packages), a .jsonl, .jsonl.zst, .jsonl.gz or .txt file, or a folder of those (recursive, in sorted
    order).

    `key` holds the text in JSON lines; a .txt file is one document. Blank lines hold no document. What cannot
    be used goes to `damage` (default: a record that raises). A source that does not exist or has no known
    ending raises at once.
    """
    damage = damage or Damage("raise")
    if str(source) == "python":
        return _python(damage)
    return _all_of(source_files(source), key, damage)


def source_files(source: str | Path) -> list[Path]:
    """The files that a file or folder source is made of, sorted."""
    path = Path(source)
    takes = f"takes 'python', a file ending in {', '.join(SUFFIXES)}, or a folder of those"
    if path.is_dir():
        files = list(_walk(path, SUFFIXES))
        if not files:
            raise ValueError(f"source: folder {path} holds no file ending in {', '.join(SUFFIXES)}")
        return files
    if not path.exists():
        raise FileNotFoundError(f"source: {path} does not exist; {takes}")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"source: got {path}, {takes}")
    return [path]


def parse(line: bytes, key: str = "text") -> dict[str, Any]:
    """The object of one JSON line, its text checked; raises Unreadable."""
    try:
        record, end = _DECODER.raw_decode(text := line.decode("utf-8").strip())
    except UnicodeDecodeError as e:
        raise Unreadable("not UTF-8", f"byte {e.start}") from None
    # not only JSONDecodeError: a number of 5,000 digits is a ValueError
    except (ValueError, RecursionError) as e:
        raise Unreadable("not JSON", str(e)) from None
    if end != len(text):
        raise Unreadable("more than one JSON value", f"the first ends at character {end} of {len(text)}")
    if not isinstance(record, dict):
        raise Unreadable("not a JSON object", f"got a {type(record).__name__}")
    if key not in record:
        raise Unreadable("missing key", f"no {key!r} among {', '.join(map(repr, list(record)[:8]))}")
    if not isinstance(record[key], str):
        raise Unreadable("not a string", f"{key!r} is a {type(record[key]).__name__}")
    if not _encodable(record[key]):
        raise Unreadable("lone surrogate", f"{key!r} is not valid Unicode")
    return record


def records(path: str | Path, key: str = "text") -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    """(line number, object) of each line that is not blank; where one cannot be used, why it cannot."""
    stream, number = lines(path), 0
    while True:
        number += 1
        try:
            line = next(stream, None)
            if line is None:
                return
            if line.strip():
                yield number, parse(line, key)
        except Unreadable as why:
            yield number, why


_DECODER = json.JSONDecoder()


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _all_of(files: list[Path], key: str, damage: Damage) -> Iterator[Document]:
    for path in files:
        yield from (
            _json_lines(path, key, damage)
            if path.name.endswith(JSON_LINES)
            else _text_file(path, "txt", damage)
        )


def _json_lines(path: Path, key: str, damage: Damage) -> Iterator[Document]:
    source = path.name.split(".jsonl")[0]
    for number, record in records(path, key):
        if isinstance(record, Unreadable):
            damage.note(path, number, record)
        else:
            yield {"text": record[key], "meta": {"source": source, "path": f"{path}:{number}"}}


def _text_file(path: Path, source: str, damage: Damage, name: str = "") -> Iterator[Document]:
    """One file, one document. Bytes are decoded as they are: newline conventions survive."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        return damage.note(path, 0, Unreadable("not UTF-8", f"byte {e.start}"))
    except OSError as e:
        return damage.note(path, 0, Unreadable("cannot be read", e.strerror or str(e)))
    if not text.strip():
        return damage.note(path, 0, Unreadable("empty"))
    yield {"text": text, "meta": {"source": source, "path": name or str(path)}}


def _python(damage: Damage) -> Iterator[Document]:
    """Files with equal contents come once. Damage is never fatal: Python ships undecodable files."""
    damage = Damage("skip", damage.counts, damage.examples)
    paths = sysconfig.get_paths()
    seen: set[bytes] = set()
    for source, root in [("stdlib", paths["stdlib"])] + [("packages", p) for p in _packages(paths)]:
        skip = ("site-packages", "dist-packages") if source == "stdlib" else ()
        for path in _walk(Path(root), (".py",), skip):
            name = path.relative_to(root).as_posix()
            for document in _text_file(path, source, damage, name):
                digest = hashlib.sha256(document["text"].encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield document


def _packages(paths: dict[str, str]) -> list[str]:
    return list(dict.fromkeys([paths["purelib"], paths["platlib"]]))  # the same folder on most systems


def _walk(root: Path, suffixes: tuple[str, ...], skip: tuple[str, ...] = ()) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(d for d in subfolders if d not in skip)
        for name in sorted(names):
            if name.endswith(suffixes):
                yield Path(folder, name)
