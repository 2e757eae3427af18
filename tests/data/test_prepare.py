"""Sources to shards: splits, limits, reuse, processes."""

import json
import os
import subprocess
import sys

import pytest

from openllama.data import prepare as prepare_module
from openllama.data import sources, unit
from openllama.data.documents import DamagedData, Fields
from openllama.data.shards import read_shards

from .preparing import OPTIONS, ROOT, all_texts, content, names, quiet


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


def test_finished_shards_on_a_read_only_disk_are_reused(source, tmp_path, monkeypatch):
    quiet(source, tmp_path / "out")
    monkeypatch.setattr(prepare_module, "sole_writer", None)
    assert quiet(source, tmp_path / "out")["reused"]


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
