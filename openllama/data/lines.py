"""Bytes and lines of plain, gzip and zstd files, in pieces: memory grows neither with a file's size nor with what a
hostile one expands to."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import zstandard

PIECE = 1 << 14  # bytes read at once
ZSTD_PIECE = 1 << 10  # zstd can make 128 KiB of 4 bytes: this holds a decompression bomb to 32 MiB a piece
LONGEST = 32 << 20  # bytes of a line or record; a longer one is no text, and would fill the memory
# What `zstd --long=31` needs; by itself the library refuses more than 128 MiB. The system gives memory as the window fills:
# a frame that only claims one (9 bytes will do) costs none.
ZSTD_WINDOW = 1 << 31

Advance = Callable[[int], None]  # told the bytes just read from the disk


class Unreadable(Exception):
    """Says why one file or record gives no document. Inside this package only: `Damage.note` decides."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def has_ending(path: str | Path, endings: str | tuple[str, ...]) -> bool:
    """In capitals too, as some systems write them."""
    return str(path).lower().endswith(endings)


def _holds_files(folder: Path) -> bool:
    """Not so where a disk was unmounted, with all files that are still to be read."""
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def unreadable(path: str | Path, error: OSError) -> Unreadable:
    """Why `path` alone cannot be read. Raises OSError for what other files may have too: each would be passed over."""
    gone_with_others = isinstance(error, FileNotFoundError) and not _holds_files(Path(path).parent)
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)) and not gone_with_others:
        return Unreadable("cannot be read", error.strerror or str(error))
    raise OSError(
        error.errno,
        f"{path}: {error.strerror or error}; check the disk and run again: it goes on where it was",
    ) from error


def lines(
    path: str | Path, advance: Advance = lambda _: None, longest: int = LONGEST
) -> Iterator[bytes | Unreadable]:
    """Lines of a plain, gzip or zstd file (by its ending), without their ends; where one cannot be used, why.

    A line of more than `longest` bytes is passed over. Where a file is damaged, its whole lines come first, then the
    reason, and that is the end.
    """
    held: list[bytes] = []  # of the line not yet ended; joined once, so that a long line costs linear time
    size, found = 0, False
    try:
        for chunk in chunks(path, advance):
            found = True
            *ended, rest = chunk.split(b"\n")
            for piece in ended:
                held.append(piece)
                yield _line(held, size + len(piece), longest)
                held, size = [], 0
            held.append(rest)
            if (size := size + len(rest)) > longest:
                held.clear()
    except Unreadable as why:
        yield why
        return
    if size:
        yield _line(held, size, longest)
    elif not found:
        yield Unreadable("empty file")


def _line(held: list[bytes], size: int, longest: int) -> bytes | Unreadable:
    if size > longest:
        return Unreadable("line too long", f"{size:,} bytes, takes at most {longest:,}")
    return b"".join(held)


def chunks(path: str | Path, advance: Advance = lambda _: None) -> Generator[bytes, None, None]:
    """The decompressed bytes of a file, in pieces; never an empty one. Raises Unreadable where it is damaged, OSError where the
    disk is."""
    kind = _zstd if has_ending(path, ".zst") else _gzip if has_ending(path, ".gz") else _plain
    try:
        yield from kind(path, advance)
    except OSError as e:
        raise unreadable(path, e) from None


def _plain(path: str | Path, advance: Advance) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(PIECE):
            advance(len(chunk))
            yield chunk


def _gzip(path: str | Path, advance: Advance) -> Iterator[bytes]:
    with open(path, "rb") as raw, gzip.open(raw, "rb") as file:
        at = 0
        try:
            while chunk := file.read1(PIECE):  # read would drop what lies before a damaged place
                advance(raw.tell() - at)
                at = raw.tell()
                yield chunk
        except EOFError:
            raise Unreadable("truncated gzip") from None
        except (gzip.BadGzipFile, zlib.error) as e:
            raise Unreadable("not gzip, or corrupt", str(e)) from None


def _zstd(path: str | Path, advance: Advance) -> Iterator[bytes]:
    """Frame by frame with decompressobj: zstandard's stream_reader ends silently where a frame is cut off."""
    frame = None
    try:
        for piece in _plain(path, advance):
            for start in range(0, len(piece), ZSTD_PIECE):
                chunk = piece[start : start + ZSTD_PIECE]
                while chunk:
                    frame = frame or zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
                    if text := frame.decompress(chunk):
                        yield text
                    chunk = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as e:
        raise Unreadable("not zstd, or corrupt", str(e)) from None
    if frame is not None:
        raise Unreadable("truncated zstd")
