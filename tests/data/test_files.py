"""Files and folders appear whole or not at all, and a full disk is named in one way, whoever writes."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from openllama import files
from openllama.training.monitor import Monitor, plot_loss, read_metrics


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": 1.0, "lr": 0.1}) + "\n" for i in range(1, 5)))
    return path


def writers(folder):
    def a_folder():
        with files.folder_written_aside(folder / "new", 0) as aside:
            (aside / "a").write_text("a")

    return {
        "json": lambda: files.write_json(folder / "new.json", {}),
        "folder": a_folder,
        "metrics": lambda: Monitor(folder / "metrics.jsonl", 2, 4),
        "picture": lambda: plot_loss(folder / "metrics.jsonl", folder / "loss.png"),
    }


@pytest.mark.parametrize("kind", ["json", "folder", "metrics", "picture"])
def test_a_full_disk_is_named_in_one_way_and_leaves_nothing(kind, metrics, tmp_path, monkeypatch):
    before = metrics.read_text()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        OSError, match="the disk is full, nothing of this is kept; free space, run again"
    ) as caught:
        writers(tmp_path)[kind]()
    assert caught.value.errno == errno.ENOSPC and str(tmp_path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"] and metrics.read_text() == before


def test_a_record_that_fits_only_in_part_is_an_error(metrics):
    """A system that has room for some of the bytes writes those and calls it a success."""
    monitor = Monitor(metrics, 4, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size + 10, hard))
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl: File too large; free space, run again"):
            monitor.valid({"step": 5, "valid_loss": 1.0, "valid_bits_per_byte": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monitor.close()
    assert [r["step"] for r in read_metrics(metrics)] == [1, 2, 3, 4]


def test_what_is_written(metrics, tmp_path):
    for write in writers(tmp_path).values():
        write()
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png", "new", "new.json"}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [json.loads(x)["step"] for x in metrics.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    "text, message",
    [
        (b'{"a": ', r"a\.json: not valid JSON \("),
        (b"\xff", r"a\.json: not valid JSON \("),
        (b"[]", r"a\.json: got a JSON list, takes an object"),
        (b'{"version": 2}', r"a\.json: got version 2, takes 1"),
        (b"{}", r"a\.json: got version None, takes 1"),
    ],
)
def test_json_that_cannot_be_used_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        files.read_json(tmp_path / "a.json", 1)
    files.write_json(tmp_path / "a.json", {"version": 1, "é": "中"})
    assert files.read_json(tmp_path / "a.json", 1) == {"version": 1, "é": "中"}


def test_a_folder_that_a_kill_left_between_its_two_renames_comes_back(tmp_path):
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old/a").write_text("older")
    (tmp_path / ".model.writing").mkdir()
    with (
        pytest.raises(FileExistsError, match="model: is there already"),
        files.folder_written_aside(tmp_path / "model", 0),
    ):
        pass
    assert (tmp_path / "model/a").read_text() == "older" and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_lines_of_metrics_that_are_no_records_are_left_out(metrics):
    metrics.write_bytes(metrics.read_bytes() + b'[1]\n5\n{"loss": 1}\n\xff\n{"step": 5, "lo')
    assert [r["step"] for r in read_metrics(metrics)] == [1, 2, 3, 4]
    Monitor(metrics, 3, 9).close()
    assert [r["step"] for r in read_metrics(metrics)] == [1, 2, 3]


def test_metrics_that_cannot_be_written_to_are_named(metrics):
    monitor = Monitor(metrics, 4, 5)
    metrics.unlink()
    metrics.mkdir()
    with pytest.raises(OSError, match=r"metrics\.jsonl: Is a directory; make it writable, run again"):
        monitor.valid({"step": 5, "valid_loss": 1.0, "valid_bits_per_byte": 1.0})
    monitor.close()


HOLD = """
import sys, time
from openllama.files import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(BlockingIOError, match=f"{tmp_path}: another run is writing here"),
            files.sole_writer(tmp_path),
        ):
            pass
        holder.kill()
    with files.sole_writer(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_file_was_removed_is_none(tmp_path, monkeypatch):
    """Its last holder removes the file: whoever had opened it before locks a file that nobody else finds."""
    flock, left = files.fcntl.flock, [1]

    def after_it_is_gone(descriptor, how):
        flock(descriptor, how)
        if left.pop():
            (tmp_path / ".lock").unlink()
            left.append(0)

    monkeypatch.setattr(files.fcntl, "flock", after_it_is_gone)
    with files.sole_writer(tmp_path):
        monkeypatch.undo()
        with pytest.raises(BlockingIOError), files.sole_writer(tmp_path):
            pass
