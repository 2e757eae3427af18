"""The one progress bar of the data steps, which several processes may advance."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

Counter = Any  # a shared 64-bit integer of multiprocessing
TOLD = 1 << 20  # bytes after which a process tells the others how far it is
LOOKED = 0.2  # seconds between two looks at a counter


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
def shared_bar(label: str, total: int | None, shown: bool = True) -> Iterator[Counter]:
    """Yields a counter of bytes, to be handed to other processes: see `counted`."""
    counter, ended = get_context("spawn").Value("q", 0), threading.Event()

    def look(advance: Callable[[int], None]) -> None:
        seen, last = 0, False
        while not last:
            last = ended.wait(LOOKED)
            now = counter.value
            advance(now - seen)
            seen = now

    with bar(label, total, shown) as advance:
        watcher = threading.Thread(target=look, args=(advance,), daemon=True)
        watcher.start()
        try:
            yield counter
        finally:
            ended.set()
            watcher.join()


@contextmanager
def counted(counter: Counter, stopping: Callable[[], bool]) -> Iterator[Callable[[int], None]]:
    """Yields a function that adds bytes to a counter, now and then. It raises InterruptedError where `stopping`."""
    held = 0

    def flush() -> None:
        nonlocal held
        with counter.get_lock():
            counter.value += held
        held = 0

    def advance(count: int) -> None:
        nonlocal held
        held += count
        if held >= TOLD:
            flush()
            if stopping():
                raise InterruptedError

    yield advance
    flush()
