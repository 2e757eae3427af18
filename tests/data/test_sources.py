import gzip
import json
import random
import sysconfig
import tracemalloc
import zlib
from itertools import islice
from pathlib import Path

import pytest
import zstandard

from openllama.data.readers import Damage, DamagedData, read


def line(text):
    return json.dumps({"text": text}).encode() + b"\n"


def write(path, data):
    pack = {".zst": zstandard.ZstdCompressor().compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def texts(source, **options):
    return [d["text"] for d in read(source, **options)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
def test_reads_json_lines(tmp_path, name):
    wanted = ["plain", "", "中文\n\u2028😀\r\n\ttab", "x" * 100_000]
    path = write(tmp_path / name, b"".join(map(line, wanted))[:-1])  # the last line has no end
    documents = list(read(path))
    assert [d["text"] for d in documents] == wanted
    assert documents[2]["meta"] == {"source": "a", "path": f"{path}:3"}


def test_reads_zstd_of_many_frames(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    frames = b"".join(map(line, ["a", "b"])), b"", b"".join(map(line, ["c", "d" * 50_000]))
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(f) for f in frames))
    assert texts(path) == ["a", "b", "c", "d" * 50_000]


def test_reads_a_folder_in_order_and_another_key(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"two\r\nlines")
    (tmp_path / "notes.md").write_bytes(b"not taken")
    write(tmp_path / "sub/c.jsonl.gz", b'{"body": "three"}\n')
    write(tmp_path / "a.jsonl", b'{"body": "one"}\n\n')
    assert texts(tmp_path, key="body") == ["one", "two\r\nlines", "three"]


BAD_LINES = {
    "not JSON": b'{"text": \n',
    "more than one JSON value": b'{"text": "x"} {"text": "y"}\n',
    "missing key": b'{"body": "x"}\n',
    "not a string": b'{"text": 5}\n',
    "not a JSON object": b'["text"]\n',
    "not UTF-8": b'{"text": "\xff"}\n',
    "lone surrogate": b'{"text": "\\ud800"}\n',
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_is_named_counted_and_the_rest_used(tmp_path, reason):
    path = write(tmp_path / "a.jsonl.zst", line("before") + BAD_LINES[reason] + line("after"))
    with pytest.raises(DamagedData, match=rf"a\.jsonl\.zst, line 2: {reason}"):
        list(read(path))
    damage = Damage()
    assert texts(path, damage=damage) == ["before", "after"]
    assert damage.to_dict() == {
        "counts": {reason: 1},
        "examples": [{"file": str(path), "line": 2, "reason": reason}],
    }


@pytest.mark.parametrize("suffix, reason", [("zst", "truncated zstd"), ("gz", "truncated gzip")])
def test_a_truncated_file_is_named_and_its_whole_lines_used(tmp_path, suffix, reason):
    made = [random.Random(i).randbytes(300).hex() for i in range(2000)]  # some zstd blocks
    path = write(tmp_path / f"a.jsonl.{suffix}", b"".join(map(line, made)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    inflate = zlib.decompressobj(31) if suffix == "gz" else zstandard.ZstdDecompressor().decompressobj()
    whole = inflate.decompress(path.read_bytes()).count(b"\n")
    write(tmp_path / "b.jsonl", line("the rest"))
    damage = Damage()
    got = texts(tmp_path, damage=damage)
    assert 1000 < whole < 1600 and got == [*made[:whole], "the rest"]
    assert damage.examples == [{"file": str(path), "line": whole + 1, "reason": reason}]
    with pytest.raises(DamagedData, match=rf"a\.jsonl\.{suffix}, line {whole + 1}: {reason}"):
        list(read(path))


@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_a_file_of_another_kind(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(line("plain text"))
    with pytest.raises(DamagedData, match=rf"a\.jsonl\.{suffix}, line 1: not "):
        list(read(path))


def test_only_the_first_examples_are_kept(tmp_path):
    damage = Damage()
    assert texts(write(tmp_path / "a.jsonl", b"no\n" * 500), damage=damage) == []
    assert damage.counts == {"not JSON": 500} and len(damage.examples) == 20


def test_bad_sources_and_policies(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist; takes 'python'"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no file ending in"):
        read(tmp_path)
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match=r"got .*a\.pdf, takes 'python'"):
        read(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="on_damage: got 'ignore'"):
        Damage("ignore")


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    with zstandard.open(path, "wb") as file:
        for i in range(40_000):
            file.write(line(random.Random(i).randbytes(300).hex()))
    tracemalloc.start()
    count = sum(1 for _ in read(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000
    assert peak < 2 << 20  # the text is 24 MB


def test_python_source_of_a_small_tree(tmp_path, monkeypatch):
    library, packages = tmp_path / "lib", tmp_path / "lib/site-packages"
    for name, data in {
        "lib/b.py": b"b = 1\n",
        "lib/a.py": b"a = 1\r\n",
        "lib/same.py": b"b = 1\n",
        "lib/latin.py": b"# \xe9\n",
        "lib/empty.py": b"\n",
        "lib/data.txt": b"no",
        "lib/site-packages/p.py": b"p = 1\n",
    }.items():
        packages.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    folders = {"stdlib": str(library), "purelib": str(packages), "platlib": str(packages)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: folders)
    damage = Damage("raise")
    documents = list(read("python", damage=damage))
    assert [d["text"] for d in documents] == ["a = 1\r\n", "b = 1\n", "p = 1\n"]
    assert [d["meta"]["source"] for d in documents] == ["stdlib", "stdlib", "packages"]
    assert documents[2]["meta"]["path"] == "p.py"
    assert damage.counts == {"empty": 1, "not UTF-8": 1}


def test_python_source_of_this_machine_is_the_same_twice():
    first, again = (list(islice(read("python"), 150)) for _ in range(2))
    assert first == again and len({d["text"] for d in first}) == 150
    assert (Path(sysconfig.get_paths()["stdlib"]) / first[0]["meta"]["path"]).exists()
