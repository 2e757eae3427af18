"""Work handed to processes, with results in the order of the work."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from queue import SimpleQueue
from typing import Any, TypeVar

_PR_SET_PDEATHSIG = 1  # prctl(2)
Work = TypeVar("Work")
Result = TypeVar("Result")


def cores() -> int:
    """Cores this process may use; os.cpu_count() would ignore a container's CPU set."""
    return len(os.sched_getaffinity(0))


def process_count(processes: int | None, work: int, work_per_process: int) -> int:
    """`processes`, or where that is None one per core, but no more than there is work for. Raises ValueError."""
    if processes is None:
        return min(cores(), 1 + work // work_per_process)
    if processes < 1:
        raise ValueError(f"processes: got {processes}, takes a whole number of at least 1, or None to choose")
    return processes


def signal_at_parents_death(number: int) -> None:
    """Linux sends this process the signal when its parent dies, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def ordered_map(
    function: Callable[..., Result], work: Iterable[Work], processes: int, shared: tuple[Any, ...] = ()
) -> Generator[Result, None, None]:
    """`function(item, *shared)` of each item, in order; items are fetched only a little ahead of the results.

    With 1 process it all happens here. `function` must be one of a module, `shared` is sent once a process. Raises
    ChildProcessError where a process dies, and whatever `function` raises, once it does.
    """
    if processes == 1:
        yield from (function(item, *shared) for item in work)
        return
    context = get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(processes, context, _start, (function, shared, stop))
    waiting: deque[Future[Result]] = deque()
    done: SimpleQueue[Future[Result]] = SimpleQueue()
    with _no_main_module(), _sigterm_as_exit(), pool:
        try:
            for item in work:
                with _signals(signal.SIG_BLOCK):
                    waiting.append(pool.submit(_call, item))
                    waiting[-1].add_done_callback(done.put)
                if len(waiting) > 4 * processes:
                    yield _first(waiting, done)
            while waiting:
                yield _first(waiting, done)
        except BrokenProcessPool:
            raise ChildProcessError(
                f"one of {processes} worker processes was killed, perhaps for the memory it took; run again with fewer "
                "processes"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)  # and waits: no worker may write once the caller goes on


def _first(waiting: deque[Future[Result]], done: SimpleQueue[Future[Result]]) -> Result:
    """The oldest result; but the error of any, which need not wait for it. `done` has them as they come."""
    with _signals(signal.SIG_BLOCK):
        while not waiting[0].done() or not done.empty():
            with _signals(signal.SIG_UNBLOCK):
                future = done.get()
            if error := future.exception():
                raise error
        return waiting.popleft().result()


@contextmanager
def _signals(how: int) -> Iterator[None]:
    """Holds back, or lets in, what asks to end. An exception amid the pool's own code would leave its locks taken, for
    ever; threads and processes that it starts hold signals back as well, and leave them to this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # changes nothing
    try:
        signal.pthread_sigmask(how, {signal.SIGINT, signal.SIGTERM})  # may raise for one that has just come
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """A scheduler's notice ends the workers too, and in order."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)


_stop: Any = None  # in a worker, the event that `ordered_map` sets


def stopping() -> bool:
    """Whether nobody waits any more for what this worker is about; work that takes long asks now and then."""
    return _stop is not None and _stop.is_set()


def _start(function: Callable[..., Any], shared: tuple[Any, ...], stop: Any) -> None:
    global _function, _shared, _stop
    _function, _shared, _stop = function, shared, stop
    # Ctrl-C reaches all: the process that hands out work ends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # with which a pool ends its processes
    signal_at_parents_death(signal.SIGKILL)  # also of one that is stopped, as by SIGSTOP
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Where the parent was killed before this worker asked to be told."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item, *_shared)


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Spawned workers would first run the caller's script again (its imports cost seconds each, and one without a
    `__main__` guard would start over); they need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
