"""Sources to shards: splits, limits, reuse, and interrupted runs that go on to the same bytes."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openllama.data import join as join_module
from openllama.data import prepare as prepare_module
from openllama.data import sources, unit
from openllama.data.documents import DamagedData, Fields
from openllama.data.prepare import prepare
from openllama.data.shards import PartWriter, read_shards
from openllama.files import sole_writer

ROOT = Path(__file__).resolve().parents[2]


def names(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:04d} " * 20}) + "\n" for i in range(300)))
    return path


def quiet(source, out, *args, **options):
    return prepare(source, out, *args, progress=False, **options)


def all_texts(out, split):
    return [d["text"] for d in read_shards(out / split)]


def test_a_split_that_gets_no_document_is_named(tmp_path):
    """One text file is one document."""
    (tmp_path / "book.txt").write_text("once upon a time\n" * 100)
    with pytest.raises(
        ValueError, match=r"out/valid: none of the source's 1 documents fell into it at valid_share=0.02"
    ):
        quiet(tmp_path / "book.txt", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    assert quiet(tmp_path / "book.txt", tmp_path / "out", valid_share=0)["documents"] == 1


@pytest.mark.parametrize("share", (0, 0.02))
def test_documents_without_text_are_no_corpus(tmp_path, share):
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n' * 300)
    with pytest.raises(
        ValueError,
        match=r"blank\.jsonl: no document was taken of it \(skipped: 300 x empty\); give a source with text",
    ):
        quiet(tmp_path / "blank.jsonl", tmp_path / "out", valid_share=share)
    assert not list((tmp_path / "out").glob("*"))


def test_prepare_splits_by_the_text_alone(source, tmp_path):
    made = quiet(source, tmp_path / "out", valid_share=0.1)
    train, valid = all_texts(tmp_path / "out", "train"), all_texts(tmp_path / "out", "valid")
    assert len(train) + len(valid) == made["documents"] == 300 and made["text_bytes"] == 30_000
    assert 10 < len(valid) < 60 and not {*train} & {*valid}
    source.write_text("".join(reversed(source.read_text().splitlines(keepends=True))))
    quiet(source, tmp_path / "reversed", valid_share=0.1)
    assert all_texts(tmp_path / "reversed", "valid") == valid[::-1]


def test_prepare_ends_on_a_document_border(source, tmp_path):
    for limit, documents in ((1000, 10), (1050, 10), (1099, 10), (1100, 11)):
        made = quiet(source, tmp_path / str(limit), limit, 0)
        assert (made["documents"], made["text_bytes"]) == (documents, documents * 100)
        assert made["valid"] is None and names(tmp_path / str(limit)) == ["train"]


def test_prepare_reuses_equal_settings_and_names_what_differs(source, tmp_path):
    out = tmp_path / "out"
    assert not quiet(source, out)["reused"]
    before = (out / "train/manifest.json").stat().st_mtime_ns
    again = quiet(source, out)
    assert again["reused"] and again["documents"] == 300
    assert (out / "train/manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"valid_share was 0\.02, now 0\.03"):
        quiet(source, out, valid_share=0.03)
    source.write_text(source.read_text() + '{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"source_bytes was \d+, now \d+"):
        quiet(source, out)
    assert (out / "train/manifest.json").stat().st_mtime_ns == before


def test_prepare_tells_sources_of_one_size_apart(source, tmp_path):
    """One file changed at its start, or at its end; and the same bytes in other files of a folder."""
    text = source.read_text()
    quiet(source, tmp_path / "out")
    for changed in (text.replace("0000 ", "9999 ", 1), text[:-10] + "x" + text[-9:]):
        assert len(changed) == len(text)
        source.write_text(changed)
        with pytest.raises(ValueError, match=r"\(source_fingerprint was '\w{16}', now '\w{16}'\)"):
            quiet(source, tmp_path / "out")
    source.write_text(text)
    os.utime(source, (1, 1))  # a copy of the same files is the same source
    assert quiet(source, tmp_path / "out")["reused"]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")
    quiet(folder, tmp_path / "of-folder", valid_share=0)
    (folder / "b.txt").rename(folder / "c.txt")
    with pytest.raises(ValueError, match="source_fingerprint was"):
        quiet(folder, tmp_path / "of-folder", valid_share=0)


def test_strict_shards_are_not_those_of_a_lenient_run(source, tmp_path):
    source.write_text(source.read_text() + "{}\n")
    quiet(source, tmp_path / "out")
    with pytest.raises(ValueError, match="on_damage was 'skip', now 'raise'"):
        quiet(source, tmp_path / "out", on_damage="raise")


def test_prepare_counts_damage_in_the_manifest(source, tmp_path):
    source.write_text(source.read_text() + "{}\n")
    made = quiet(source, tmp_path / "out")
    assert made["documents"] == 300
    assert json.loads((tmp_path / "out/train/manifest.json").read_text())["damage"] == {
        "counts": {"missing key": 1},
        "examples": [{"file": "in.jsonl", "line": 301, "reason": "missing key"}],
    }
    with pytest.raises(DamagedData, match=r"in\.jsonl, line 301: missing key"):
        quiet(source, tmp_path / "strict", on_damage="raise")
    assert names(tmp_path / "strict") == []


def test_prepare_leaves_other_files_alone(source, tmp_path):
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/mine").touch()
    with pytest.raises(FileExistsError, match=r"train: holds files but no manifest\.json"):
        quiet(source, tmp_path / "out")
    assert names(tmp_path / "out/train") == ["mine"]


def test_prepare_refuses_an_empty_corpus_and_bad_arguments(source, tmp_path):
    with pytest.raises(ValueError, match=r"in\.jsonl: no document was taken of it .*larger max_bytes"):
        quiet(source, tmp_path / "out", 50)
    with pytest.raises(ValueError, match="max_bytes: got 0"):
        quiet(source, tmp_path / "out", 0)
    with pytest.raises(ValueError, match=r"valid_share: got 1\.5"):
        quiet(source, tmp_path / "out", valid_share=1.5)
    assert not (tmp_path / "out/train").exists()


# ---------------------------------------------------------------- interrupted runs


@pytest.fixture
def files(tmp_path):
    """Five files of 57 records, some of them damaged, in two formats."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for f in range(5):
        rows = [{"body": f"{f} {i} " + "x" * (i % 7), "kind": f"k{i % 3}"} for i in range(57)]
        encoded = [json.dumps(r) if i % 10 else "{}" for i, r in enumerate(rows)]
        if f % 2:
            (folder / f"{f}.json").write_text("[" + ",\n".join(encoded) + "]")
        else:
            (folder / f"{f}.jsonl").write_text("\n".join(encoded))
    return folder


OPTIONS = {"valid_share": 0.2, "fields": Fields(("body",), "kind"), "lines_per_shard": 16}


def content(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


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


def test_shards_within_their_source_are_refused(files):
    with pytest.raises(ValueError, match=r"out: .*/raw/shards lies in the source .*/raw, where a later run"):
        quiet(files, files / "shards", **OPTIONS)


def test_the_process_count_does_not_matter(files, tmp_path, monkeypatch):
    """Units of some files are made side by side; shards are whole across them, and nothing is lost or repeated."""
    monkeypatch.setattr(sources, "UNIT_BYTES", (1000, 1000))
    for processes in (1, 2):
        made = quiet(files, tmp_path / str(processes), processes=processes, **OPTIONS)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    for split in ("train", "valid"):
        sizes = [shard["lines"] for shard in made[split]["shards"]]
        assert {*sizes[:-1]} == {16} and 1 <= sizes[-1] <= 16
    monkeypatch.setattr(sources, "UNIT_BYTES", (1 << 20, 1 << 20))
    one = quiet(files, tmp_path / "one", **OPTIONS)
    for split in ("train", "valid"):
        assert sorted(all_texts(tmp_path / "1", split)) == sorted(all_texts(tmp_path / "one", split))
        assert made[split]["damage"] == one[split]["damage"]
        assert made[split]["categories"] == one[split]["categories"]
    with pytest.raises(ValueError, match="processes: got 0"):
        quiet(files, tmp_path / "0", processes=0, **OPTIONS)
    assert names(tmp_path / "0") == []


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


def test_finished_shards_on_a_read_only_disk_are_reused(source, tmp_path, monkeypatch):
    quiet(source, tmp_path / "out")
    monkeypatch.setattr(prepare_module, "sole_writer", None)
    assert quiet(source, tmp_path / "out")["reused"]


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


def test_a_key_that_is_no_category_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(unit, "MOST_CATEGORIES", 100)
    rows = [{"text": f"{i} text", "url": f"https://x.y/{i}"} for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"over 100 categories, takes a key of fewer .*; got 'url'"):
        quiet(tmp_path / "a.jsonl", tmp_path / "out", fields=Fields(("text",), "url"))


def test_counts_by_category(files, tmp_path):
    made = quiet(files, tmp_path / "out", **OPTIONS)
    counted = {}
    for split in ("train", "valid"):
        for document in read_shards(tmp_path / "out" / split):
            counted.setdefault((split, document["meta"]["category"]), []).append(len(document["text"]))
        for category, counts in made[split]["categories"].items():
            sizes = counted[split, category]
            assert counts == {"lines": len(sizes), "text_bytes": sum(sizes)}
    assert {c for _, c in counted} == {"k0", "k1", "k2"}
    assert made["train"]["damage"]["counts"] == {"missing key": 30} and made["documents"] == 255
    assert all(s["lines"] == 16 for s in made["train"]["shards"][:-1])


def test_a_copy_of_the_source_elsewhere_is_the_same_source(source, tmp_path):
    quiet(source, tmp_path / "out")
    (tmp_path / "moved").mkdir()
    source.rename(tmp_path / "moved" / source.name)
    assert quiet(tmp_path / "moved" / source.name, tmp_path / "out")["reused"]


def test_another_code_folder_of_the_same_name_is_another_source(tmp_path):
    for parent in "ab":
        (tmp_path / parent / "proj").mkdir(parents=True)
        (tmp_path / parent / "proj/x.py").write_text(f"{parent} = 1\n")
    quiet(f"code:{tmp_path}/a/proj", tmp_path / "out", valid_share=0)
    assert quiet(f"code:{tmp_path}/a/proj", tmp_path / "out", valid_share=0)["reused"]
    with pytest.raises(ValueError, match="source_fingerprint was"):
        quiet(f"code:{tmp_path}/b/proj", tmp_path / "out", valid_share=0)


def test_the_script_compares_with_the_published_size(tmp_path):
    """Where the whole set was read; and says what else it saw."""
    (tmp_path / "raw").mkdir()
    lines = [json.dumps({"text": f"text {i}", "meta": {"pile_set_name": "Github"}}) for i in range(300)]
    (tmp_path / "raw/00.jsonl").write_text("\n".join([*lines, "{}"]))
    (tmp_path / "raw/01.jsonl.xz").touch()
    command = [
        sys.executable,
        ROOT / "train/prepare_data.py",
        "--source",
        tmp_path / "raw",
        "--corpus",
        "pile",
    ]

    def said(*more):
        return subprocess.run([*command, *more], capture_output=True, text=True, check=True, cwd=ROOT).stdout

    whole = said("--out", tmp_path / "whole")
    assert "301 lines read, 0.00% of the 210,607,728 published for pile (monology/pile-uncopyrighted" in whole
    assert "skipped: 1 x missing key (examples in" in whole and "passed over: 1 x .xz" in whole
    assert "published" not in said("--out", tmp_path / "part", "--max-bytes", "1000")
