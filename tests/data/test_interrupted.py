"""Runs of `prepare` that were interrupted go on to the same bytes; one runs at a time."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from openllama.data import join as join_module
from openllama.data import sources, unit
from openllama.data.documents import DamagedData
from openllama.data.shards import PartWriter
from openllama.files import sole_writer

from .preparing import OPTIONS, content, names, quiet


@pytest.mark.parametrize("max_bytes", [None, 1200])
def test_an_interrupted_run_goes_on_to_the_same_bytes(files, tmp_path, monkeypatch, max_bytes):
    """Stopped after any number of documents, twice, each time in another place."""
    monkeypatch.setattr(sources, "UNIT_BYTES", (4500, 4500))  # three units of two, two and one file
    options = {**OPTIONS, "max_bytes": max_bytes}
    made = quiet(files, tmp_path / "whole", processes=1, **options)
    wanted, write_line = content(tmp_path / "whole"), PartWriter.write_line
    draw, resumed = random.Random(0), 0
    for trial in range(12):
        out = tmp_path / f"parted{trial}"
        for stop in (draw.randrange(1, made["documents"]), draw.randrange(1, made["documents"])):
            left = [stop]

            def interrupted(self, *args, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return write_line(self, *args)

            monkeypatch.setattr(PartWriter, "write_line", interrupted)
            try:
                quiet(files, out, processes=1, **options)
            except KeyboardInterrupt:
                assert not (out / "train").exists()
            if trial % 2:  # cut off by a full disk
                for journal in out.glob(".unfinished/*/journal.jsonl"):
                    journal.write_bytes(journal.read_bytes() + b'{"shards": {"train')
                for held in out.glob(".unfinished/*/held-*"):  # lines after the last that counts
                    held.write_bytes(held.read_bytes() + b'{"text": "ha')
            for train in out.glob(".unfinished/unit-*/train"):  # what SIGKILL leaves of an open part
                (train / "part-00099.jsonl.zst.tmp").write_bytes(b"half")
        monkeypatch.setattr(PartWriter, "write_line", write_line)
        resumed += any(out.glob(".unfinished/*/journal.jsonl"))
        assert quiet(files, out, processes=1, **options)["documents"] == made["documents"]
        assert content(out) == wanted
    assert resumed > 2


@pytest.mark.parametrize("share", [0, 0.02, 0.2])
def test_goes_on_after_the_last_training_shard(files, tmp_path, monkeypatch, share):
    """However rare held-out documents are: those of the open shard need not be read again."""
    options, written = OPTIONS | {"valid_share": share}, 200
    quiet(files, tmp_path / "whole", processes=1, **options)
    interrupted_run(files, tmp_path / "out", monkeypatch, written, **options)
    parsed, document = [0], unit.document

    def counted(*args):
        parsed[0] += 1
        return document(*args)

    monkeypatch.setattr(unit, "document", counted)
    quiet(files, tmp_path / "out", processes=1, **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    # a sixth of the records before were damaged or held out, and up to a shard of 16 is written again
    assert parsed[0] - (285 - written) < 16 / (1 - share)


def interrupted_run(source, out, monkeypatch, documents=150, **options):
    write_line, count = PartWriter.write_line, [0]

    def interrupted(self, *args):
        count[0] += 1
        if count[0] > documents:
            raise KeyboardInterrupt
        return write_line(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PartWriter, "write_line", interrupted)
        quiet(source, out, processes=1, **options)
    assert any(out.glob(".unfinished/*/journal.jsonl"))


def test_a_run_goes_on_in_the_same_files_only(files, tmp_path, monkeypatch):
    """Of sources whose finished shards stay good when they change, too: python and hf."""
    pytest.importorskip("datasets")
    rows = "".join(json.dumps({"text": f"{i} text"}) + "\n" for i in range(300))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/a.jsonl").write_text(rows)
    modules = tmp_path / "modules"
    modules.mkdir()
    for i in range(300):
        (modules / f"m{i:03}.py").write_text(f"x = {i}\n")
    paths = {"stdlib": str(modules), "purelib": str(tmp_path / "none"), "platlib": str(tmp_path / "none")}
    monkeypatch.setattr("openllama.data.sources.sysconfig.get_paths", lambda: paths)
    options = {"lines_per_shard": 16}
    for source, add in (
        (f"hf:{tmp_path}/hub", lambda: (tmp_path / "hub/0.jsonl").write_text(rows)),
        ("python", lambda: (modules / "a.py").write_text("y = 1\n")),
        (files, lambda: (files / "00.jsonl").write_text(rows)),
    ):
        out = tmp_path / f"out-{len(str(source))}"
        keys = options | ({"fields": OPTIONS["fields"]} if source is files else {})
        interrupted_run(source, out, monkeypatch, **keys)
        add()
        with pytest.raises(ValueError, match=r"others than when the run was interrupted|had other settings"):
            quiet(source, out, **keys)


def test_one_run_at_a_time(files, tmp_path):
    out = tmp_path / "out"
    with sole_writer(out), pytest.raises(BlockingIOError, match=r"out: another run is writing here; wait"):
        quiet(files, out, **OPTIONS)
    out.mkdir()
    (out / ".lock").touch()  # what a kill leaves holds nobody up
    assert not quiet(files, out, **OPTIONS)["reused"] and names(out) == ["train", "valid"]


def test_an_error_ends_the_other_processes(files, tmp_path, monkeypatch):
    """A unit that takes minutes must not be waited for once another has failed."""
    monkeypatch.setattr(sources, "UNIT_BYTES", (1, 1))
    with pytest.raises(DamagedData, match=r"\d\.jsonl?, (line|record) 1: missing key"):
        quiet(files, tmp_path / "out", processes=2, on_damage="raise", **OPTIONS)


@pytest.mark.parametrize("renames", range(0, 12, 3))
def test_an_interrupted_join_goes_on(files, tmp_path, monkeypatch, renames):
    monkeypatch.setattr(sources, "UNIT_BYTES", (1000, 1000))
    quiet(files, tmp_path / "whole", **OPTIONS)
    renamed, left = join_module._renamed, [renames]

    def interrupted(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return renamed(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(join_module, "_renamed", interrupted)
        quiet(files, tmp_path / "out", processes=1, **OPTIONS)
    for split in (tmp_path / "out/.unfinished").glob("train"):
        (split / "part-00099.jsonl.zst.tmp").write_bytes(b"half")
    made = quiet(files, tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "whole") and made["rate"] == 0


def test_a_full_disk_is_named_and_the_run_goes_on(files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "_close", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(
            OSError, match=r"out: the disk is full; free space and run again, it goes on where"
        ):
            quiet(files, tmp_path / "out", **OPTIONS)
    quiet(files, tmp_path / "out", **OPTIONS)


def test_an_interrupted_run_of_other_settings_is_named(files, tmp_path, monkeypatch):
    interrupted_run(files, tmp_path / "out", monkeypatch, **OPTIONS)
    with pytest.raises(
        ValueError, match=r"an interrupted run had other settings \(valid_share was 0.2, now 0.3\)"
    ):
        quiet(files, tmp_path / "out", **OPTIONS | {"valid_share": 0.3})
    lost = next((tmp_path / "out/.unfinished").glob("*/train/part-00000*"))
    data = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=r"part-00000.*: not as the interrupted run left it; remove"):
        quiet(files, tmp_path / "out", **OPTIONS)
    lost.write_bytes(data)
    quiet(files, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_between_the_last_two_renames(source, tmp_path, monkeypatch, renames):
    """Nothing is made again; and another run's settings are refused while that can still go on."""
    out = tmp_path / "out"
    quiet(source, tmp_path / "whole")
    replace, left = os.replace, [renames]

    def killed(old, new):
        if Path(new).parent == out:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        quiet(source, out)
    with pytest.raises(
        ValueError, match=r"\.unfinished: an interrupted run had other settings \(valid_share"
    ):
        quiet(source, out, valid_share=0.5)
    assert quiet(source, out)["reused"]
    assert content(out) == content(tmp_path / "whole") and names(out) == ["train", "valid"]


def test_after_damage_that_is_fatal_either_advice_can_be_taken(files, tmp_path):
    for repaired in (False, True):
        with pytest.raises(DamagedData, match="repair or remove it, or pass on_damage='skip'"):
            quiet(files, tmp_path / "out", on_damage="raise", **OPTIONS)
        assert names(tmp_path) == ["raw"]
        if repaired:
            for path in files.iterdir():
                path.write_text(path.read_text().replace("{}", '{"body": "b", "kind": "k"}'))
    assert quiet(files, tmp_path / "out", on_damage="raise", **OPTIONS)["documents"] == 285


def test_a_change_amid_a_file_of_one_size_ends_a_resumed_run(tmp_path, monkeypatch):
    """The fingerprint takes the ends of files only: enough for what is finished, not for going on in it."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"{i:06d} " * 40}) + "\n" for i in range(1500)]
    path.write_text("".join(lines))
    interrupted_run(path, tmp_path / "out", monkeypatch, 700, lines_per_shard=16)
    path.write_text("".join([*lines[:300], *lines[600:900], *lines[300:600], *lines[900:]]))
    with pytest.raises(
        ValueError, match=r"the files of a\.jsonl are others than when the run was interrupted"
    ):
        quiet(path, tmp_path / "out", lines_per_shard=16)


@pytest.mark.parametrize("names_too", [True, False])
def test_a_source_that_goes_away_is_not_taken_for_damage(files, tmp_path, monkeypatch, names_too):
    """A disk that is unmounted takes all files with it: the run stops, and goes on when they are back."""
    quiet(files, tmp_path / "whole", **OPTIONS)
    away, document, left = tmp_path / "away", unit.document, [100]

    def vanishing(*args):
        left[0] -= 1
        if not left[0]:
            shutil.copytree(files, away)
            for path in files.iterdir():
                path.unlink()
            if names_too:
                files.rmdir()
        return document(*args)

    with monkeypatch.context() as patch:
        patch.setattr(unit, "document", vanishing)
        with pytest.raises(OSError, match=r"raw/2\.jsonl: No such file .*run again: it goes on where it was"):
            quiet(files, tmp_path / "out", **OPTIONS)
    files.mkdir(exist_ok=True)
    for path in away.iterdir():
        shutil.copy2(path, files)
    assert content(tmp_path / "whole") == content_of_run(files, tmp_path / "out")


def content_of_run(files, out):
    shutil.rmtree(out / ".unfinished", ignore_errors=True)  # the copies have times of their own
    quiet(files, out, **OPTIONS)
    return content(out)
