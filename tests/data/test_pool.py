"""Processes that leave with the one that uses them."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from openllama.data.pool import _signals, ordered_map

ROOT = Path(__file__).resolve().parents[2]


def add(number, more):
    return number + more


def fail(number):
    if number == 5:
        raise KeyError("five")
    return number


def die(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("processes", [1, 2])
def test_in_order_and_only_a_little_ahead(processes):
    taken = []
    work = (taken.append(i) or i for i in range(100))
    results = ordered_map(add, work, processes, (10,))
    assert [next(results) for _ in range(3)] == [10, 11, 12]
    assert len(taken) <= 3 + 4 * processes + 1
    results.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_errors_come_through(processes):
    with pytest.raises(KeyError, match="five"):
        list(ordered_map(fail, range(10), processes))


def test_a_worker_that_is_killed_is_named():
    with pytest.raises(
        ChildProcessError, match=r"one of 2 worker processes was killed, .*run again with fewer"
    ):
        list(ordered_map(die, range(10), 2))


def test_a_signal_waits_for_the_pools_own_code(monkeypatch):
    """An exception there would leave locks taken, and the process waiting for ever: one in ten did."""
    submit, whole = ProcessPoolExecutor.submit, []

    def interrupted(self, *arguments):
        if len(whole) == 3:
            signal.raise_signal(signal.SIGTERM)  # to this thread: another would take it at once
        whole.append(submit(self, *arguments))
        return whole[-1]

    monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
    with pytest.raises(SystemExit) as stopped:
        list(ordered_map(add, itertools.count(), 2, (1,)))
    assert stopped.value.code == 143 and len(whole) == 4


def test_a_signal_that_comes_as_they_are_held_back_leaves_none_held_back(monkeypatch):
    sigmask, both = signal.pthread_sigmask, {signal.SIGINT, signal.SIGTERM}

    def interrupted(how, signals):
        sigmask(how, signals)
        if how == signal.SIG_BLOCK and signals:
            raise KeyboardInterrupt  # as a handler may that runs when the call ends
        return set()

    monkeypatch.setattr(signal, "pthread_sigmask", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt), _signals(signal.SIG_BLOCK):
            pass
    finally:
        left = sigmask(signal.SIG_UNBLOCK, both)
    assert not left & both


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(c) for c in found.read_text().split()] if found.exists() else []


def wait_until(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_no_worker_outlives_the_process_that_uses_it(number, code, tmp_path):
    """Signals go to the whole group, as Ctrl-C does; SIGKILL to one, as the kernel's does."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import itertools, operator
            from openllama import cli
            from openllama.data.pool import ordered_map
            cli.run(lambda: sum(ordered_map(operator.neg, itertools.count(), 2)))
            """)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, script], stderr=subprocess.PIPE, env=environment, start_new_session=True
    )
    wait_until(lambda: len(children(process.pid)) >= 3)  # two workers, and what tracks their semaphores
    time.sleep(1)
    workers = children(process.pid)
    (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code, said
    if number == signal.SIGINT:
        assert said.startswith(b"stopped by Ctrl-C") and said.count(b"\n") == 1, said
    assert number != signal.SIGTERM or not said
    wait_until(lambda: not any(Path(f"/proc/{w}").exists() for w in workers))
