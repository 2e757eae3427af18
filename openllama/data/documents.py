"""From a record to a document {"text": str, "meta": {"category": ..., "path": ...}}, and the account of what gives none."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .formats import Data, unit
from .lines import Unreadable

Document = dict[str, Any]

LONGEST_CATEGORY = 256  # bytes; a longer one is no kind of text, and manifests hold all of them
EXAMPLES = 20  # of each reason, kept with file and line; the rest is only counted


class DamagedData(ValueError):
    """A file or a record that cannot be used; the message names both."""


@dataclass(frozen=True)
class Fields:
    """Keys of a record; a dot goes into an object. Several texts are joined by newlines, as WuDao's title and content.

    A category may be a number, which is written out, or null, which is called "none".
    """

    text: tuple[str, ...] = ("text",)
    category: str | None = None  # None: the name of the file

    @property
    def columns(self) -> list[str]:
        """The outermost keys."""
        return [key.split(".")[0] for key in (*self.text, *([self.category] if self.category else []))]


@dataclass
class Damage:
    """What was skipped, per reason, with the first examples. `policy` "raise" stops at the first instead."""

    policy: str = "skip"
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.policy not in ("skip", "raise"):
            raise ValueError(f"on_damage: got {self.policy!r}, takes 'skip' (count and go on) or 'raise'")

    def note(self, file: str, number: int, why: Unreadable) -> None:
        """Counts one damaged place; number 0 means the file as a whole."""
        if self.policy == "raise":
            place = f"{file}, {unit(file)} {number}" if number else file
            raise DamagedData(
                f"{place}: {why}; repair or remove it, or pass on_damage='skip' to count it and go on"
            )
        self.counts[why.reason] = self.counts.get(why.reason, 0) + 1
        if self.counts[why.reason] <= EXAMPLES:
            self.examples.append({"file": file, unit(file): number, "reason": why.reason})

    def add(self, counts: dict[str, int], examples: list[dict[str, Any]]) -> None:
        """Adds what `to_dict` gave of a later part."""
        for example in examples:
            seen = sum(known["reason"] == example["reason"] for known in self.examples)
            self.examples += [example] if seen < EXAMPLES else []
        for reason, count in counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count

    def to_dict(self) -> dict[str, Any]:
        return {"counts": dict(sorted(self.counts.items())), "examples": list(self.examples)}


def document(data: Data, fields: Fields, category: str, path: str) -> Document:
    """The document of one record; `category` where the record names none. Raises Unreadable."""
    if isinstance(data, Unreadable):
        raise data
    if isinstance(data, str):
        text = data
    else:
        record = parse(data) if isinstance(data, bytes) else data
        text = "\n".join(t for t in (_text(record, key) for key in fields.text) if t)
        if fields.category is not None:
            category = _category(record, fields.category)
    if not text or text.isspace():
        raise Unreadable("empty")
    if not (_encodable(text) and _encodable(category)):
        raise Unreadable("lone surrogate", "not valid Unicode")
    if len(category.encode()) > LONGEST_CATEGORY:
        raise Unreadable("category too long", f"takes at most {LONGEST_CATEGORY} bytes")
    return {"text": text, "meta": {"category": category, "path": path}}


def parse(line: bytes) -> dict[str, Any]:
    """The object of a record's bytes. Raises Unreadable."""
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
    return record


_DECODER = json.JSONDecoder()


def _category(record: dict[str, Any], key: str) -> str:
    value = _value(record, key)
    if value is None:
        return "none"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _string(value, key)


def _text(record: dict[str, Any], key: str) -> str:
    return _string(_value(record, key), key)


def _value(record: dict[str, Any], key: str) -> Any:
    value: Any = record
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise Unreadable("missing key", f"no {key!r} among {', '.join(map(repr, list(record)[:8]))}")
        value = value[name]
    return value


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise Unreadable("not a string", f"{key!r} is a {type(value).__name__}")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
