"""Signals: what stops a run, without losing it."""

from __future__ import annotations

import signal


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
