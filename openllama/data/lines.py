"""Lines of plain, gzip and zstd files, decompressed in pieces: memory does not grow with a file's size."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

CHUNK = 1 << 14  # compressed bytes read at once; text rarely expands more than tenfold, so this bounds memory


class Unreadable(Exception):
    """Says why one file or line gives no document. Inside this package only: `Damage.note` decides."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def lines(path: str | Path) -> Iterator[bytes]:
    """Lines of a plain, gzip or zstd file (by its ending). Raises Unreadable where a damaged one ends."""
    chunks = (
        _zstd(path)
        if str(path).endswith(".zst")
        else _gzip(path)
        if str(path).endswith(".gz")
        else _plain(path)
    )
    parts: list[bytes] = []  # of the line not yet ended; joined once, so that a long line costs linear time
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        for piece in rest:
            yield b"".join(parts)
            parts = [piece]
    if any(parts):
        yield b"".join(parts)


def _plain(path: str | Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _gzip(path: str | Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        try:
            while chunk := file.read1(CHUNK):  # read would drop what lies before a damaged place
                yield chunk
        except EOFError:
            raise Unreadable("truncated gzip") from None
        except (gzip.BadGzipFile, zlib.error) as e:
            raise Unreadable("not gzip, or corrupt", str(e)) from None


def _zstd(path: str | Path) -> Iterator[bytes]:
    """Frame by frame with decompressobj: zstandard's stream_reader ends silently where a frame is cut off."""
    frame = None
    with open(path, "rb") as file:
        try:
            while chunk := file.read(CHUNK):
                while chunk:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    if text := frame.decompress(chunk):
                        yield text
                    chunk = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        except zstandard.ZstdError as e:
            raise Unreadable("not zstd, or corrupt", str(e)) from None
    if frame is not None:
        raise Unreadable("truncated zstd")
