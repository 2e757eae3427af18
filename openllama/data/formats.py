"""Records of one file, by its format: JSON lines, a JSON array, parquet, or the whole of a text.

Each comes as (number, data): the line or the place in the file, from 1 (0: the file as a whole); the record as it lies
there (the bytes of a JSON value; a parquet row, or what is parsed already, as a dict; a text as a str), or why it cannot
be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .arrays import elements
from .lines import LONGEST, Advance, Unreadable, chunks, has_ending, lines, unreadable

Data = bytes | str | dict[str, Any] | Unreadable
Records = Iterator[tuple[int, Data]]

COMPRESSED = ("", ".zst", ".gz")
JSON_LINES = tuple(f".jsonl{c}" for c in COMPRESSED)
JSON = tuple(f".json{c}" for c in COMPRESSED)
TEXT = (".txt",)
PARQUET = (".parquet",)
SUFFIXES = (*JSON_LINES, *JSON, *PARQUET, *TEXT)
# Bytes of a text file, which some corpora come as (enwik8, 100 MB): it is held whole.
LONGEST_TEXT = 256 << 20
PARQUET_READ = 1 << 20  # bytes of a column read at once
BOM = b"\xef\xbb\xbf"  # some editors put it before the first line


def unit(path: str | Path) -> str:
    """What the numbers of this file's records count."""
    return "line" if has_ending(path, JSON_LINES) else "record"


def records(path: Path, after: int, columns: list[str], advance: Advance) -> Records:
    """The records of `path` with a number above `after`. Those before are passed over without being parsed.

    `columns`: names of the keys that will be used: parquet is read by columns.
    """
    if has_ending(path, JSON):
        found = json_values(path, advance)
    elif has_ending(path, PARQUET):
        found = parquet_rows(path, after, columns, advance)
    elif has_ending(path, JSON_LINES):
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
        if path.stat().st_size > LONGEST_TEXT:
            yield 0, Unreadable("text too long", f"takes at most {LONGEST_TEXT:,} bytes: divide it")
            return
        data = path.read_bytes()
        advance(len(data))
        yield 0, data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as e:
        yield 0, Unreadable("not UTF-8", f"byte {e.start}")
    except OSError as e:
        yield 0, unreadable(path, e)


def json_values(path: Path, advance: Advance, longest: int = LONGEST) -> Records:
    """The elements of a JSON array, one at a time, however long the file; or, where none opens it, its lines."""
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
        yield from elements(buffer[buffer.index(b"[") + 1 :], pieces, longest)
    except Unreadable as why:
        yield 0, why


def parquet_rows(path: Path, after: int, columns: list[str], advance: Advance) -> Records:
    """Row by row, some hundred in memory at once; row groups before `after` are not read."""
    import pyarrow
    from pyarrow import parquet

    try:
        # buffered, as otherwise whole columns of a row group are read at once: with one group, all of the file
        with parquet.ParquetFile(path, buffer_size=PARQUET_READ, pre_buffer=False) as file:
            size, names = path.stat().st_size, [c for c in columns if c in file.schema_arrow.names]
            row = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if row + count > after:
                    yield from _group_rows(file, group, names, row, after)
                row += count
                advance(size // file.num_row_groups)
        if not row:
            yield 0, Unreadable("empty file")
    except pyarrow.ArrowException as e:
        yield 0, Unreadable("not parquet, or corrupt", str(e))
    except OSError as e:  # pyarrow has it for corrupt pages too, then without a number of the system's
        yield 0, unreadable(path, e) if e.errno else Unreadable("not parquet, or corrupt", str(e))


def _group_rows(file: Any, group: int, names: list[str], row: int, after: int) -> Records:
    for batch in file.iter_batches(256, row_groups=[group], columns=names):
        for value in _values(batch):
            row += 1
            if row > after:
                yield row, value


def _values(batch: Any) -> list[Data]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as e:
        if batch.num_rows == 1:
            return [Unreadable("not UTF-8", f"byte {e.start}")]
        return [value for i in range(batch.num_rows) for value in _values(batch.slice(i, 1))]
