import random
import sysconfig
import tracemalloc
import zlib
from itertools import islice
from pathlib import Path

import pytest
import zstandard

from openllama.data import arrays
from openllama.data import lines as lines_module
from openllama.data.documents import Damage, DamagedData, Fields
from openllama.data.formats import json_values
from openllama.data.sources import open_source

from .reading import array, line, read, texts, write


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
def test_reads_json_lines(tmp_path, name):
    wanted = ["plain", "two", "中文\n\u2028😀\r\n\ttab", "x" * 100_000]
    path = write(tmp_path / name, b"".join(map(line, wanted))[:-1])  # the last line has no end
    documents = list(read(path))
    assert [d["text"] for d in documents] == wanted
    assert documents[2]["meta"] == {"category": "a", "path": f"{name}:3"}


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
    assert texts(tmp_path, Fields(("body",))) == ["one", "two\r\nlines", "three"]


BAD_LINES = {
    "not JSON": b'{"text": \n',
    "more than one JSON value": b'{"text": "x"} {"text": "y"}\n',
    "missing key": b'{"body": "x"}\n',
    "not a string": b'{"text": 5}\n',
    "not a JSON object": b'["text"]\n',
    "not UTF-8": b'{"text": "\xff"}\n',
    "lone surrogate": b'{"text": "\\ud800"}\n',
    "empty": b'{"text": " \\n"}\n',
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
        "examples": [{"file": "a.jsonl.zst", "line": 2, "reason": reason}],
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
    assert damage.examples == [{"file": path.name, "line": whole + 1, "reason": reason}]
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
    for source, kind, message in (
        (tmp_path / "none.jsonl", FileNotFoundError, r"none\.jsonl does not exist; takes a file ending in"),
        (tmp_path, ValueError, "holds no file ending in"),
        (tmp_path / "a.pdf", ValueError, r"got .*a\.pdf, takes a file ending in"),
        (f"code:{tmp_path}/none", FileNotFoundError, "none is no folder; takes code:FOLDER"),
        (f"code:{tmp_path}", ValueError, "holds no source file"),
    ):
        (tmp_path / "a.pdf").touch()
        with pytest.raises(kind, match=message):
            open_source(source, Fields())
        (tmp_path / "a.pdf").unlink()
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
    damage = Damage()
    documents = list(read("python", damage=damage))
    assert [d["text"] for d in documents] == ["a = 1\r\n", "b = 1\n", "p = 1\n"]
    assert [d["meta"]["category"] for d in documents] == ["stdlib", "stdlib", "packages"]
    assert documents[2]["meta"]["path"] == "p.py"
    assert damage.counts == {"empty": 1, "not UTF-8": 1}


def test_python_source_of_this_machine_is_the_same_twice():
    first, again = (list(islice(read("python", damage=Damage()), 150)) for _ in range(2))
    assert first == again and len({d["text"] for d in first}) == 150
    assert (Path(sysconfig.get_paths()["stdlib"]) / first[0]["meta"]["path"]).exists()


# ---------------------------------------------------------------- other formats


WUDAO = [
    {"title": "标题", "content": '内容 "引号" \\ [括号] {', "dataType": "百科"},
    {"title": "", "content": "x" * 300_000, "dataType": "新闻"},
    {"title": "三", "content": "末", "dataType": "百科"},
]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
def test_reads_json_arrays_as_wudao_has_them(tmp_path, name):
    path = write(tmp_path / name, array(WUDAO))
    documents = list(read(path, Fields(("title", "content"), "dataType")))
    assert [d["text"] for d in documents] == ['标题\n内容 "引号" \\ [括号] {', "x" * 300_000, "三\n末"]
    assert [d["meta"] for d in documents] == [
        {"category": c, "path": f"{name}:{i}"} for i, c in enumerate(["百科", "新闻", "百科"], 1)
    ]


@pytest.mark.parametrize(
    "data, got, damage",
    [
        (b'[{"text": "a"}, {"text": }, {"text": "c"}]', ["a", "c"], {"not JSON": [2]}),
        (
            b'[{"text": "a"}, 5, ["x", {"text": "y"}], {"text": "d"}]',
            ["a", "d"],
            {"not a JSON object": [2, 3]},
        ),
        (b'[{"text": "a"}, {"text": "b', ["a"], {"truncated JSON array": [2]}),
        (b'[{"text": "a"}] [{"text": "b"}]', ["a", "b"], {"more than one JSON value": [2]}),
        (b'[{"text": "a"}, {"text": "\xff"}, {"text": "c"}]', ["a", "c"], {"not UTF-8": [2]}),
        (b'[{"text": "a"},, {"text": "\\""},]\n', ["a", '"'], {"not JSON": [2, 4]}),
        (b"[]", [], {"empty file": [0]}),
        (b" \n", [], {"empty file": [0]}),
        (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"], {}),
    ],
)
def test_damage_in_arrays_is_named(tmp_path, data, got, damage):
    path = write(tmp_path / "a.json", data)
    noted = Damage()
    assert texts(path, damage=noted) == got
    assert noted.counts == {reason: len(places) for reason, places in damage.items()}
    assert [e["record"] for e in noted.examples] == sorted(p for places in damage.values() for p in places)


def test_arrays_are_parted_at_any_border_of_what_is_read(tmp_path, monkeypatch):
    """Escapes, quotes and brackets on every border between two pieces."""
    values = [{"text": "\\" * n + '"}],[{' * n + "\\"} for n in range(1, 12)]
    path = write(tmp_path / "a.json", array(values))
    for chunk in range(2, 60):
        monkeypatch.setattr(arrays, "READ", chunk)
        monkeypatch.setattr(arrays, "WINDOW_MOST", chunk // 2)
        monkeypatch.setattr(lines_module, "PIECE", 1)
        assert texts(path) == [v["text"] for v in values]


def test_a_record_longer_than_memory_may_hold_is_named(tmp_path):
    path = write(tmp_path / "a.json", array([{"text": "a"}, {"text": "x" * 1_000_000}]))
    found = list(json_values(path, lambda _: None, longest=300_000))
    assert found[0][1] == {"text": "a"} and found[1][1].reason == "record too long" and len(found) == 2


def test_reads_parquet_by_named_keys(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = [{"body": f"text {i}" if i != 7 else None, "lang": "de", "other": i} for i in range(1000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
    damage, fields = Damage(), Fields(("body",), "lang")
    documents = list(read(path, fields, damage))
    assert [d["text"] for d in documents] == [r["body"] for r in rows if r["body"]]
    assert documents[8]["meta"] == {"category": "de", "path": "a.parquet:10"}
    assert damage.to_dict() == {
        "counts": {"not a string": 1},
        "examples": [{"file": "a.parquet", "record": 8, "reason": "not a string"}],
    }
    assert texts(path, fields, damage, after=(0, 650)) == [f"text {i}" for i in range(650, 1000)]
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"no parquet", data[:500] + bytes(200) + data[700:]):
        path.write_bytes(broken)
        noted = Damage()
        got = texts(path, fields, noted)
        assert noted.counts and len(got) < 999, broken[:20]
    with pytest.raises(DamagedData, match=r"a\.parquet, record 1: missing key .no 'text'"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        texts(path)


def test_reads_datasets_of_the_hub_library_offline(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "train.jsonl", b"".join(map(line, ["a", "b", "c"])))
    assert texts(f"hf:{folder}") == ["a", "b", "c"]
    assert texts(f"hf:{folder}", after=(0, 1)) == ["b", "c"]
    assert next(read(f"hf:{folder}"))["meta"] == {"category": "corpus", "path": f"hf:{folder}:1"}
    with pytest.raises(ValueError, match=r"hf:.*:valid cannot be opened .*takes hf:NAME"):
        texts(f"hf:{folder}:valid")


def test_reads_code_folders_by_language_once(tmp_path):
    for name, data in {
        "src/a.py": b"a = 1\n",
        "src/b.cu": b"__global__ void f();\n",
        "same.py": b"a = 1\n",
        "README.md": b"# hello\n",
        "node_modules/x.js": b"no\n",
        ".git/c.py": b"no = 1\n",
        "picture.png": b"no",
        "src/latin.c": b"// \xe9\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    damage = Damage()
    found = [(d["meta"]["category"], d["meta"]["path"]) for d in read(f"code:{tmp_path}", damage=damage)]
    assert found == [("markdown", "README.md"), ("python", "same.py"), ("cuda", "src/b.cu")]
    assert damage.examples == [{"file": "src/latin.c", "record": 0, "reason": "not UTF-8"}]
