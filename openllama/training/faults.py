"""Signals and full disks: what stops a run, without losing it."""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StopSignal:
    """Remembers SIGTERM (a scheduler's notice) or SIGINT (Ctrl-C), so that the step in progress can end first.

    A second signal gets Python's default handling, for whoever can't wait.
    """

    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.received = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    @property
    def exit_code(self) -> int:
        """128 + signal, the shell's convention: 143 for SIGTERM."""
        return 128 + self.received if self.received else 0


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Removes `folder`, half-written, when its writing fails; a full disk is named as such."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        # safetensors reports the system's error as text only
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OSError(
                errno.ENOSPC, "the disk is full; what was saved before is untouched; free space and go on", str(folder)
            ) from error
        raise


def check_room(folder: Path, size: int) -> None:
    """Raises OSError before anything is written where `size` bytes can't fit beside `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; what was saved before is untouched",
            str(folder),
        )
