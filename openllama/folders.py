"""Folders that appear whole or not at all: written aside, synced to disk, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(
    folder: str | Path, size: int, replaceable: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """A temporary sibling of `folder` to write into; it takes the name `folder` when the block ends without an error.

    Args:
        folder: the target. One that exists and is not empty is replaced where `replaceable(folder)`, else refused.
        size: bytes that will be written: too little room is an error before anything is.
        replaceable: whether what lies at the target may go.

    Raises:
        FileExistsError: something else lies at the target.
        OSError: no room, or a disk that became full on the way; the target is as it was and nothing else is left.
    """
    folder = Path(os.path.abspath(folder))
    occupied = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not (folder.is_dir() and replaceable(folder)):
        raise FileExistsError(
            f"{folder}: is there already and holds something else; takes a new or empty folder, name another"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{folder}: takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; free space, run again",
        )
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.writing")
    try:
        aside.mkdir()
        yield aside
        for path in aside.iterdir():
            path.chmod(aside.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
            _sync(path)
        _sync(aside)
        _move_into_place(aside, folder)
    except BaseException as e:
        shutil.rmtree(aside, ignore_errors=True)
        # safetensors hands on the system's error as text only
        if getattr(e, "errno", None) == errno.ENOSPC or "No space left" in str(e):
            raise OSError(
                errno.ENOSPC, f"{folder}: the disk is full, nothing of this is kept; free space, run again"
            ) from e
        raise
    _sync(folder.parent)


def _move_into_place(aside: Path, folder: Path) -> None:
    """A rename can't replace a folder that holds something: the older one steps back first, and goes afterwards."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(aside, folder)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
