"""The one progress bar of the data steps, which several processes may advance."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

# Shared 64-bit integers of multiprocessing, one for each part of the work: no lock, which a process that is killed might hold.
ByteCounts = Any
LOOKED = 0.2  # seconds between two looks at them


@contextmanager
def bar(label: str, total: int | None, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances the bar by a number of bytes of text."""
    if not shown:
        yield lambda count: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def shared_bar(label: str, total: int | None, parts: int, shown: bool = True) -> Iterator[ByteCounts]:
    """Yields the counts of bytes of so many parts of the work. Each is added to by one process, the bar shows their sum."""
    counts, ended = get_context("spawn").RawArray("q", parts), threading.Event()

    def look(advance: Callable[[int], None]) -> None:
        seen, last = 0, False
        while not last:
            last = ended.wait(LOOKED)
            now = sum(counts)
            advance(now - seen)
            seen = now

    with bar(label, total, shown) as advance:
        watcher = threading.Thread(target=look, args=(advance,), daemon=True)
        watcher.start()
        try:
            yield counts
        finally:
            ended.set()
            watcher.join()
