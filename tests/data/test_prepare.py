"""Sources to shards: splits, limits, reuse, and interrupted runs that go on to the same bytes."""

import json
import os
import random

import pytest

from openllama.data import prepare as prepare_module
from openllama.data.documents import DamagedData, Fields
from openllama.data.prepare import prepare
from openllama.data.shards import ShardWriter, read_shards


def names(folder):
    return sorted(p.name for p in folder.iterdir())


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
    monkeypatch.setattr(prepare_module, "BATCH_RECORDS", 9)
    options = {**OPTIONS, "max_bytes": max_bytes}
    made = quiet(files, tmp_path / "whole", processes=1, **options)
    wanted, write_line = content(tmp_path / "whole"), ShardWriter.write_line
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

            monkeypatch.setattr(ShardWriter, "write_line", interrupted)
            try:
                quiet(files, out, processes=1, **options)
            except KeyboardInterrupt:
                assert not (out / "train").exists()
            if (
                journal := out / ".unfinished/journal.jsonl"
            ).exists() and trial % 2:  # cut off by a full disk
                journal.write_bytes(journal.read_bytes() + b'{"split": "train", "sha')
            if (out / ".unfinished/train").exists():  # what SIGKILL leaves of the part that was being written
                (out / ".unfinished/train/part-00099.jsonl.zst.tmp").write_bytes(b"half")
        monkeypatch.setattr(ShardWriter, "write_line", write_line)
        resumed += (out / ".unfinished/journal.jsonl").exists()
        assert quiet(files, out, processes=1, **options)["documents"] == made["documents"]
        assert content(out) == wanted
    assert resumed > 2


def test_goes_on_where_it_was(files, tmp_path, monkeypatch):
    """Without parsing again what lies in complete shards of all splits."""
    write_line, count = ShardWriter.write_line, [0]

    def interrupted(self, *args):
        count[0] += 1
        if count[0] > 200:
            raise KeyboardInterrupt
        return write_line(self, *args)

    monkeypatch.setattr(ShardWriter, "write_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(files, tmp_path / "out", processes=1, **OPTIONS)
    parsed, prepare_one = [0], prepare_module._prepare_one

    def counted(*args):
        parsed[0] += 1
        return prepare_one(*args)

    monkeypatch.setattr(ShardWriter, "write_line", write_line)
    monkeypatch.setattr(prepare_module, "_prepare_one", counted)
    quiet(files, tmp_path / "out", processes=1, **OPTIONS)
    assert 57 * 5 - 200 < parsed[0] < 57 * 5 * 2 // 3


def test_the_process_count_does_not_matter(files, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_RECORDS", 9)
    for processes in (1, 2):
        quiet(files, tmp_path / str(processes), processes=processes, **OPTIONS)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    with pytest.raises(ValueError, match="processes: got 0"):
        quiet(files, tmp_path / "0", processes=0, **OPTIONS)


def test_an_interrupted_run_of_other_settings_is_named(files, tmp_path, monkeypatch):
    write_line, count = ShardWriter.write_line, [0]

    def interrupted(self, *args):
        count[0] += 1
        if count[0] > 150:
            raise OSError(28, "No space left on device")
        return write_line(self, *args)

    monkeypatch.setattr(ShardWriter, "write_line", interrupted)
    with pytest.raises(OSError, match="disk is full"):
        quiet(files, tmp_path / "out", **OPTIONS)
    monkeypatch.setattr(ShardWriter, "write_line", write_line)
    with pytest.raises(
        ValueError, match=r"an interrupted run had other settings \(valid_share was 0.2, now 0.3\)"
    ):
        quiet(files, tmp_path / "out", **OPTIONS | {"valid_share": 0.3})
    lost = next((tmp_path / "out/.unfinished/train").glob("part-00000*"))
    data = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=r"part-00000.*: not as the interrupted run left it; remove"):
        quiet(files, tmp_path / "out", **OPTIONS)
    lost.write_bytes(data)
    quiet(files, tmp_path / "out", **OPTIONS)


def test_a_kill_between_the_last_two_renames(source, tmp_path):
    out = tmp_path / "out"
    quiet(source, out)
    wanted = content(out)
    (out / ".unfinished").mkdir()
    (out / "train").rename(out / ".unfinished/train")
    assert quiet(source, out)["reused"]
    assert content(out) == wanted and names(out) == ["train", "valid"]


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
