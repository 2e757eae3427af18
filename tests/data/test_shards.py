import errno
import hashlib
import json
import os

import pytest
import zstandard

from openllama import files
from openllama.data import shards
from openllama.data.documents import DamagedData
from openllama.data.shards import ShardWriter, read_manifest, read_shard, read_shards


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_equal_line_counts_in_all_but_the_last(shards_of):
    wanted = [f"document {i} 中\n" for i in range(10)]
    folder = shards_of(wanted, lines_per_shard=4)
    assert names(folder) == ["manifest.json", *(f"part-0000{i}.jsonl.zst" for i in range(3))]
    manifest = read_manifest(folder)
    assert [s["lines"] for s in manifest["shards"]] == [4, 4, 2] and manifest["lines"] == 10
    assert manifest["text_bytes"] == sum(len(t.encode()) for t in wanted)
    assert manifest["categories"] == {"test": {"lines": 10, "text_bytes": manifest["text_bytes"]}}
    for shard in manifest["shards"]:
        data = (folder / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert zstandard.ZstdDecompressor().decompressobj().decompress(data).count(b"\n") == shard["lines"]
    assert [d["text"] for d in read_shards(folder)] == wanted


def test_reading_a_shard_tells_how_far_it_is(shards_of):
    folder, read = shards_of("abcdef", lines_per_shard=3), []
    entry = read_manifest(folder)["shards"][1]
    assert [d["text"] for d in read_shard(folder, entry, read.append)] == [*"def"]
    assert sum(read) == entry["bytes"]


def test_a_full_last_shard_is_not_followed_by_an_empty_one(shards_of):
    assert [s["lines"] for s in read_manifest(shards_of("abcd", lines_per_shard=2))["shards"]] == [2, 2]
    assert shards.LINES_PER_SHARD == 16384


def test_equal_input_gives_equal_bytes(shards_of):
    wanted = [f"{i}" * i for i in range(1, 50)]
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
    data = zstandard.ZstdCompressor().compress(
        b'{"text": "a", "meta": {"category": "x"}}\n{"text": "b"} 1\n{"text": "c"}\n'
    )
    (folder / "part-00000.jsonl.zst").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = len(data)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedData, match=r"part-00000\.jsonl\.zst, line 2: more than one JSON value"):
        list(read_shards(folder))
    manifest["version"] = 99
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: got version 99, takes 2"):
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
