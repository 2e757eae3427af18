import errno
import hashlib
import json
import os

import pytest
import zstandard

from openllama import files
from openllama.data import shards
from openllama.data.prepare import fraction, prepare, sample
from openllama.data.readers import DamagedData
from openllama.data.shards import ShardWriter, read_manifest, read_shards


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_equal_line_counts_in_all_but_the_last(shards_of):
    wanted = [f"document {i} 中\n" for i in range(10)]
    folder = shards_of(wanted, lines_per_shard=4)
    assert names(folder) == ["manifest.json", *(f"part-0000{i}.jsonl.zst" for i in range(3))]
    manifest = read_manifest(folder)
    assert [s["lines"] for s in manifest["shards"]] == [4, 4, 2] and manifest["lines"] == 10
    assert manifest["text_bytes"] == sum(len(t.encode()) for t in wanted)
    assert manifest["categories"] == {"test": 10}
    for shard in manifest["shards"]:
        data = (folder / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert zstandard.ZstdDecompressor().decompressobj().decompress(data).count(b"\n") == shard["lines"]
    assert [d["text"] for d in read_shards(folder)] == wanted


def test_a_full_last_shard_is_not_followed_by_an_empty_one(shards_of):
    assert [s["lines"] for s in read_manifest(shards_of("abcd", lines_per_shard=2))["shards"]] == [2, 2]
    assert shards.LINES_PER_SHARD == 16384


def test_equal_input_gives_equal_bytes(shards_of):
    wanted = [f"{i}" * i for i in range(50)]
    first, again = (shards_of(wanted, name, lines_per_shard=20) for name in "ab")
    assert names(first) == names(again)
    assert all((first / n).read_bytes() == (again / n).read_bytes() for n in names(first))
    assert shards.fingerprint(first) == shards.fingerprint(again)


def test_an_empty_corpus_is_an_error(shards_of, tmp_path):
    with pytest.raises(ValueError, match="the corpus is empty"):
        shards_of([])
    assert names(tmp_path / "shards") == []


def test_never_writes_into_a_folder_that_holds_something(shards_of):
    shards_of("a")
    with pytest.raises(FileExistsError, match="takes a new or empty folder"):
        shards_of("b")


def test_missing_short_and_damaged_files_are_named(shards_of):
    folder = shards_of("abcdef", lines_per_shard=3)
    part = folder / "part-00001.jsonl.zst"
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    with pytest.raises(
        ValueError, match=rf"part-00001\.jsonl\.zst: has {len(data) - 1} bytes, .* says {len(data)}"
    ):
        read_shards(folder)
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the checksum
    with pytest.raises(DamagedData, match=r"part-00001\.jsonl\.zst, line \d: not zstd, or corrupt"):
        list(read_shards(folder))
    part.unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00001\.jsonl\.zst: missing"):
        read_shards(folder)
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        read_shards(folder / "none")


def test_a_bad_line_in_a_shard_is_named(shards_of):
    folder = shards_of("abc")
    data = zstandard.ZstdCompressor().compress(b'{"text": "a"}\n{"text": "b"} 1\n{"text": "c"}\n')
    (folder / "part-00000.jsonl.zst").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = len(data)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedData, match=r"part-00000\.jsonl\.zst, line 2: more than one JSON value"):
        list(read_shards(folder))
    manifest["version"] = 99
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: got version 99, takes 1"):
        read_shards(folder)


@pytest.mark.parametrize("key", ["settings", "lines", "name", "bytes", "sha256"])
def test_a_manifest_without_its_keys_is_named(shards_of, key):
    folder = shards_of("abc")
    manifest = json.loads((folder / "manifest.json").read_text())
    (manifest if key in manifest else manifest["shards"][0]).pop(key)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=rf"manifest\.json: no key '{key}'; damaged: copy or make its folder"
    ):
        read_shards(folder)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["write", "sync", "flush"])
def test_a_full_disk_leaves_nothing_half_written(shards_of, tmp_path, monkeypatch, step):
    if step == "sync":
        monkeypatch.setattr(os, "fsync", full_disk)
    elif step == "flush":
        monkeypatch.setattr(ShardWriter, "_close", full_disk)
    else:
        put, calls = ShardWriter._put, []
        monkeypatch.setattr(
            ShardWriter,
            "_put",
            lambda self, d: full_disk() if len(calls) > 1 else (calls.append(1), put(self, d)),
        )
    with pytest.raises(OSError, match=r"part-00000\.jsonl\.zst: the disk is full") as caught:
        shards_of(["a", "b", "c"])
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path / "shards") == []


def test_a_full_disk_keeps_the_older_file(tmp_path, monkeypatch):
    files.write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"a\.json: the disk is full"):
        files.write_json(tmp_path / "a.json", {"new": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1} and names(tmp_path) == ["a.json"]


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
        ValueError, match=r"blank\.jsonl: its 300 documents hold no text; give a source with text"
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
        "examples": [{"file": str(source), "line": 301, "reason": "missing key"}],
    }
    with pytest.raises(DamagedData, match=r"in\.jsonl, line 301: missing key"):
        quiet(source, tmp_path / "strict", on_damage="raise")
    assert names(tmp_path / "strict") == []


def test_prepare_makes_unfinished_folders_again(source, tmp_path):
    out = tmp_path / "out"
    quiet(source, out)
    wanted = all_texts(out, "train")
    (out / ".unfinished").mkdir()
    (out / "train").rename(out / ".unfinished/train")  # killed between the two renames
    assert not quiet(source, out)["reused"]
    assert all_texts(out, "train") == wanted and names(out) == ["train", "valid"]


def test_prepare_leaves_other_files_alone(source, tmp_path):
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/mine").touch()
    with pytest.raises(FileExistsError, match=r"train: holds files but no manifest\.json"):
        quiet(source, tmp_path / "out")
    assert names(tmp_path / "out/train") == ["mine"]


def test_prepare_refuses_an_empty_corpus_and_bad_arguments(source, tmp_path):
    with pytest.raises(ValueError, match=r"the corpus is empty .*larger max_bytes"):
        quiet(source, tmp_path / "out", 50)
    with pytest.raises(ValueError, match="max_bytes: got 0"):
        quiet(source, tmp_path / "out", 0)
    with pytest.raises(ValueError, match=r"valid_share: got 1\.5"):
        quiet(source, tmp_path / "out", valid_share=1.5)
    assert not (tmp_path / "out/train").exists()


def test_samples_are_spread_and_the_same_every_time(shards_of):
    folder = shards_of([f"{i:05d}" for i in range(2000)])
    some = list(sample(folder, 2500))
    assert some == list(sample(folder, 2500)) and 400 < len(some) < 600
    assert len(list(sample(folder, 10_000))) == 2000
    assert 0 <= fraction("a") < 1 and fraction("a") != fraction("a", "salt")
