"""Records of one file, by its format: JSON lines, a JSON array, parquet, or the whole of a text.

Each comes as (number, data): the line or the place in the file, from 1 (0: the file as a whole); the record as it lies
there (the bytes of a JSON value, a parquet row as a dict, a text as a str), or why it cannot be used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .lines import LONGEST, Advance, Unreadable, chunks, lines

Data = bytes | str | dict[str, Any] | Unreadable
Records = Iterator[tuple[int, Data]]

COMPRESSED = ("", ".zst", ".gz")
JSON_LINES = tuple(f".jsonl{c}" for c in COMPRESSED)
JSON = tuple(f".json{c}" for c in COMPRESSED)
TEXT = (".txt",)
PARQUET = (".parquet",)
SUFFIXES = (*JSON_LINES, *JSON, *PARQUET, *TEXT)
READ = 1 << 18  # bytes read on at a time for an array, at least
BOM = b"\xef\xbb\xbf"  # some editors put it before the first line


def unit(path: str | Path) -> str:
    """What the numbers of this file's records count."""
    return "line" if str(path).endswith(JSON_LINES) else "record"


def records(path: Path, after: int, columns: list[str], advance: Advance) -> Records:
    """The records of `path` with a number above `after`. Those before are passed over without being parsed.

    `columns`: names of the keys that will be used: parquet is read by columns.
    """
    name = path.name
    if name.endswith(JSON):
        found = json_values(path, advance)
    elif name.endswith(PARQUET):
        found = parquet_rows(path, after, columns, advance)
    elif name.endswith(JSON_LINES):
        found = json_lines(path, advance)
    else:
        found = whole_text(path, advance)
    return _beyond(found, after)


def _beyond(found: Records, after: int) -> Records:
    """Those above `after`. What is wrong with a file gets a number behind the records that came before it."""
    last = after
    for number, data in found:
        if not number and last:
            number = last + 1
        last = max(last, number)
        if number > after or not number:
            yield number, data


def json_lines(path: Path, advance: Advance) -> Records:
    for number, line in enumerate(lines(path, advance), 1):
        if isinstance(line, Unreadable):
            # where nothing could be read at all, it is not line 1 that is to blame
            yield (0 if line.reason in ("empty file", "cannot be read") else number), line
            continue
        if number == 1:
            line = line.removeprefix(BOM)
        if line and not line.isspace():
            yield number, line


def whole_text(path: Path, advance: Advance) -> Records:
    """One file, one document. Bytes are decoded as they are: newline conventions survive."""
    try:
        if path.stat().st_size > LONGEST:
            yield 0, Unreadable("text too long", f"{path.stat().st_size:,} bytes, takes at most {LONGEST:,}")
            return
        data = path.read_bytes()
        advance(len(data))
        yield 0, data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as e:
        yield 0, Unreadable("not UTF-8", f"byte {e.start}")
    except OSError as e:
        yield 0, Unreadable("cannot be read", e.strerror or str(e))


_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*'
# In one step: an object that holds no other and no array, as most records do; a string (or one that the buffer cuts off:
# no group 1); a character that opens, parts or ends values.
_TOKEN = re.compile(
    rb'\{[^{}\[\]"]*(?:' + _STRING + rb'"[^{}\[\]"]*)*\}|' + _STRING + rb'(?:(")|\\?\Z)|[\[\]{},]', re.DOTALL
)


def json_values(path: Path, advance: Advance, longest: int = LONGEST) -> Records:
    """The elements of a JSON array, one at a time, however long the file; or, where none opens it, its lines.

    Elements are parted by counting brackets outside of strings; where a bracket or quote is missing, the rest is lost.
    """
    pieces, buffer = chunks(path, advance), b""
    try:
        while not buffer.strip() and (piece := next(pieces, None)) is not None:
            buffer = (buffer + piece).removeprefix(BOM).lstrip()
        if not buffer.strip():
            yield 0, Unreadable("empty file")
            return
        if not buffer.lstrip().startswith(b"["):
            pieces.close()
            yield from json_lines(path, lambda _: None)
            return
        yield from _elements(buffer[buffer.index(b"[") + 1 :], pieces, longest)
    except Unreadable as why:
        yield 0, why


def _elements(buffer: bytes, pieces: Iterator[bytes], longest: int) -> Records:
    start = at = depth = 0  # where the element begins, where to look on, brackets open in it
    number, broken = 1, None
    while True:
        token = _TOKEN.search(buffer, at)
        if token is None or (token[0].startswith(b'"') and not token[1]):
            # nothing more that is whole: keep the element's beginning and read on, ever more of a long one
            at = (token.start() if token else len(buffer)) - start
            buffer, start = buffer[start:], 0
            if len(buffer) > longest:
                yield (
                    number,
                    Unreadable("record too long", f"over {longest:,} bytes; the rest of the file is lost"),
                )
                return
            more, why = _at_least(pieces, max(READ, len(buffer)))
            broken = broken or why
            if not more:
                yield number, broken or Unreadable("truncated JSON array", "the rest of the file is lost")
                return
            buffer += more
            continue
        at, mark = token.end(), token[0]
        if mark in (b"{", b"["):
            depth += 1
        elif depth and mark in (b"}", b"]"):
            depth -= 1
        elif not depth and mark in (b",", b"]"):
            element = buffer[start : token.start()].strip()
            if element or mark == b"," or number > 1:  # else it is [], which holds none
                yield number, element or Unreadable("not JSON", "nothing between two commas")
                number += 1
            start = at
            if mark == b"]":
                break
    if broken:
        yield number, broken
    elif buffer[at:].strip() or any(piece.strip() for piece in pieces):
        yield number, Unreadable("more than one JSON value", "text after the array's end")


def _at_least(pieces: Iterator[bytes], size: int) -> tuple[bytes, Unreadable | None]:
    """So many bytes more, or those up to the end or to a damaged place, and why it is one."""
    got, total, why = [], 0, None
    try:
        while total < size and (piece := next(pieces, None)) is not None:
            got.append(piece)
            total += len(piece)
    except Unreadable as e:
        why = e
    return b"".join(got), why


def parquet_rows(path: Path, after: int, columns: list[str], advance: Advance) -> Records:
    """Row by row, some hundred in memory at once; row groups before `after` are not read."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = [c for c in columns if c in file.schema_arrow.names]
            row = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if row + count > after:
                    yield from _group_rows(file, group, names, row, after)
                row += count
                advance(path.stat().st_size // file.num_row_groups)
    except OSError as e:
        yield 0, Unreadable("cannot be read", e.strerror or str(e))
    except pyarrow.ArrowException as e:
        yield 0, Unreadable("not parquet, or corrupt", str(e))


def _group_rows(file: Any, group: int, names: list[str], row: int, after: int) -> Records:
    for batch in file.iter_batches(256, row_groups=[group], columns=names):
        for value in batch.to_pylist():
            row += 1
            if row > after:
                yield row, value
