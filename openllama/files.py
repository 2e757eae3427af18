"""Files and folders that appear whole or not at all (written aside, synced, renamed), and JSON in them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, a user's share of it


@contextmanager
def file_written_aside(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when the block ends without an error, else nothing.

    A full disk raises OSError (ENOSPC) that names the file and what to do.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")  # without a process id: what a kill left is overwritten
    try:
        with open(aside, "wb") as file:
            yield file
        _sync(aside)
        os.replace(aside, path)
    except BaseException as e:
        aside.unlink(missing_ok=True)
        _name_full_disk(path, e)
        raise
    _sync(path.parent)


@contextmanager
def folder_written_aside(
    folder: str | Path, size: int, replaceable: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """A temporary sibling of `folder` to write into; it becomes `folder` when the block ends well.

    Args:
        folder: the target. One that is not empty is replaced where `replaceable(folder)`, else refused.
        size: bytes that will be written: too little room is an error before anything is.
        replaceable: whether what lies at the target may go.

    Raises:
        FileExistsError: something else lies at the target.
        OSError: no room, or a disk full on the way; the target is as it was, nothing else is left.
    """
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_away_a_killed_run(folder)
    occupied = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not (folder.is_dir() and replaceable(folder)):
        raise FileExistsError(
            f"{folder}: is there already and holds something else; takes a new or empty folder, name another"
        )
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{folder}: takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; free space, run again",
        )
    aside = _beside(folder, "writing")
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
        _name_full_disk(folder, e)
        raise
    _sync(folder.parent)


@contextmanager
def sole_writer(folder: str | Path) -> Iterator[None]:
    """Holds `folder`, which it makes, for this process. Raises BlockingIOError where another process does.

    The lock is the kernel's, so it ends with the process, however that ends. Where a file system has none, nothing is
    held.
    """
    path = Path(folder) / ".lock"
    new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(path)
    try:
        yield
    finally:
        # while it is held: `_locked` notices that its file is gone, and makes another
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if new:
            with suppress(OSError):  # that it holds something
                path.parent.rmdir()


@contextmanager
def goes_on_after_full_disk(folder: str | Path) -> Iterator[None]:
    """Names `folder` for a full disk, for work that goes on where it was when it is run again."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL:
            raise
        raise OSError(
            e.errno, f"{folder}: the disk is full; free space and run again, it goes on where it was"
        ) from None


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise BlockingIOError(
                f"{path.parent}: another run is writing here; wait until it has ended, or choose another folder"
            ) from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
        with suppress(FileNotFoundError):  # its last holder has removed it in between
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


def _beside(folder: Path, what: str) -> Path:
    """Without a process id, so that what a killed run left is found by the next one."""
    return folder.with_name(f".{folder.name}.{what}")


def _clear_away_a_killed_run(folder: Path) -> None:
    """What it was writing goes; the older folder, if it was between its two renames, comes back."""
    shutil.rmtree(_beside(folder, "writing"), ignore_errors=True)
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _move_into_place(aside: Path, folder: Path) -> None:
    """A rename can't replace a folder that holds something: the older one steps back first, then goes."""
    old = _beside(folder, "old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(aside, folder)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _name_full_disk(path: Path, error: BaseException) -> None:
    # safetensors hands on the system's error as text only
    if getattr(error, "errno", None) in FULL or "No space left" in str(error):
        raise OSError(
            errno.ENOSPC, f"{path}: the disk is full, nothing of this is kept; free space, run again"
        ) from error


def _sync(path: Path) -> None:
    """For a folder too: a rename survives a power cut only once its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    with file_written_aside(path) as file:
        file.write((json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path, version: int | None = None, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The object in a JSON file, of this `version` where one is given, with these `keys`. Raises ValueError naming
    the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:  # of json, of UTF-8, or a number of 5,000 digits
        raise ValueError(f"{path}: not valid JSON ({e}); damaged: copy or make its folder again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, takes an object")
    if version is not None and value.get("version") != version:
        raise ValueError(
            f"{path}: got version {value.get('version')!r}, takes {version}: made by another release; use "
            "that one, or make the folder again"
        )
    check_keys(path, value, keys)
    return value


def check_keys(path: str | Path, value: dict[str, Any], keys: Iterable[str]) -> None:
    """Raises ValueError naming `path` and the first of `keys` that `value`, an object in it, lacks."""
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{path}: no key {missing[0]!r}; damaged: copy or make its folder again")


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
