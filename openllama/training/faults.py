"""Signals: what stops a run, without losing it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from openllama.data.pool import signal_at_parents_death

_LAUNCHERS = {
    "accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run",
}  # fmt: skip


def stop_with_launcher() -> None:
    """A launcher may end without a word to its child, on SIGTERM (accelerate) or killed: then Linux sends it SIGTERM."""
    launcher = os.getppid()
    command = Path(f"/proc/{launcher}/cmdline")
    if command.exists() and is_launcher(command.read_bytes().decode(errors="replace").split("\0")):
        signal_at_parents_death(signal.SIGTERM)
        if os.getppid() != launcher:  # too late for that
            os.kill(os.getpid(), signal.SIGTERM)


def is_launcher(command: list[str]) -> bool:
    """Whether a process's arguments are a launcher's, and not a shell's, whose end must not stop a run."""
    return bool({Path(word).name for word in command} & _LAUNCHERS)


class StopSignal:
    """Remembers SIGTERM (a scheduler's notice) or SIGINT (Ctrl-C), so that the step in progress can end first.

    More SIGTERMs change nothing: schedulers signal every process, and launchers forward it once more. A second Ctrl-C
    ends the run at once, for whoever can't wait. A context: the handlers from before come back at its end.
    """

    def __enter__(self) -> StopSignal:
        self.received = 0
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    @property
    def exit_code(self) -> int:
        """128 + signal, the shell's convention; SIGTERM's 143 where another process got the signal."""
        return 128 + (self.received or signal.SIGTERM)
