"""Damaged sources: named, counted, and the rest is used."""

import errno
import gzip
import os
import random
import re
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from openllama.data import formats
from openllama.data import lines as lines_module
from openllama.data.documents import Damage, Fields
from openllama.data.formats import unit
from openllama.data.lines import lines
from openllama.data.sources import open_source

from .reading import array, line, read, texts, write


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.json", "a.json.zst", "a.txt"])
def test_an_empty_file_is_counted(tmp_path, name):
    (tmp_path / name).touch()
    write(tmp_path / "b.jsonl", line("the rest"))
    damage = Damage()
    assert texts(tmp_path, damage=damage) == ["the rest"]
    assert sum(damage.counts.values()) == 1 and "empty" in damage.examples[0]["reason"]
    assert damage.examples[0]["file"] == name


def test_a_long_line_is_passed_over_without_being_held(tmp_path):
    path = write(tmp_path / "a.jsonl.zst", line("a") + b"x" * 50_000_000 + b"\n" + line("c"))
    tracemalloc.start()
    found = list(lines(path, longest=100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0] == line("a")[:-1] and found[2:] == [line("c")[:-1]]
    assert (found[1].reason, found[1].detail) == ("line too long", "50,000,000 bytes, takes at most 100,000")
    assert peak < 110 << 20  # three copies of what 1 KiB of zstd may give


def test_a_decompression_bomb_is_a_long_line(tmp_path):
    """1 GB of zeros in 100 KB."""
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    with (tmp_path / "a.jsonl.zst").open("wb") as file:
        block = bytes(1 << 24)
        for _ in range(64):
            file.write(compressor.compress(block))
        file.write(compressor.flush())
    write(tmp_path / "b.jsonl", line("the rest"))
    assert (tmp_path / "a.jsonl.zst").stat().st_size < 1 << 20
    damage = Damage()
    assert texts(tmp_path, damage=damage) == ["the rest"]
    assert damage.counts == {"line too long": 1}


def test_a_byte_order_mark_costs_no_record(tmp_path):
    mark = b"\xef\xbb\xbf"
    write(tmp_path / "a.jsonl", mark + line("a") + line("b"))
    write(tmp_path / "b.json", mark + array([{"text": "c"}]))
    write(tmp_path / "c.txt", mark + b"d")
    assert texts(tmp_path) == ["a", "b", "c", "d"]


def test_a_file_removed_while_reading_is_named(tmp_path):
    write(tmp_path / "a.jsonl", line("a"))
    write(tmp_path / "b.jsonl", line("b"))
    write(tmp_path / "c.jsonl", line("c"))
    damage = Damage()
    documents = read(tmp_path, damage=damage)
    assert next(documents)["text"] == "a"
    (tmp_path / "b.jsonl").unlink()
    assert [d["text"] for d in documents] == ["c"]
    assert damage.examples == [{"file": "b.jsonl", "line": 0, "reason": "cannot be read"}]


def test_file_names_that_are_not_utf_8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    write(path, line("a"))
    assert next(read(tmp_path))["meta"] == {"category": "caf\ufffd", "path": "caf\ufffd.jsonl:1"}
    assert open_source(tmp_path, Fields()).fingerprint


@pytest.mark.parametrize("start", range(0, 9))
def test_goes_on_after_any_place(tmp_path, start):
    write(tmp_path / "a.jsonl.zst", b"".join(map(line, "abc")) + b"\n")
    write(tmp_path / "b.json", array([{"text": c} for c in "def"]))
    write(tmp_path / "c.txt", b"g")
    places = [r.place for r in open_source(tmp_path, Fields()).records((-1, 0), lambda _: None)]
    assert len(places) == 7
    after = ((-1, 0), *places)[min(start, 7)]
    assert "".join(texts(tmp_path, after=after)) == "abcdefg"[start:]


def test_a_named_pipe_in_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", line("b"))
    assert texts(tmp_path) == ["b"]


def test_whole_records_before_a_damaged_place_in_an_array_are_used(tmp_path):
    path = write(tmp_path / "a.json.gz", array([{"text": f"document {i}"} for i in range(5000)]))
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # of the checksum
    path.write_bytes(data)
    damage = Damage()
    assert len(texts(path, damage=damage)) == 5000 and sum(damage.counts.values()) == 1


def test_damage_amid_a_file_is_counted_by_a_run_that_goes_on_before_it(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = [{"text": random.Random(i).randbytes(200).hex()} for i in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500)
    data = bytearray(path.read_bytes())
    for i in range(len(data) * 4 // 5, len(data) * 4 // 5 + 3000):
        data[i] ^= 255
    path.write_bytes(data)
    whole, resumed = Damage(), Damage()
    read_whole = texts(path, damage=whole)
    assert len(read_whole) < 3000 and texts(path, damage=resumed, after=(0, 700)) == read_whole[700:]
    assert whole.counts == resumed.counts and sum(whole.counts.values()) >= 1


def test_each_reason_has_examples_of_its_own(tmp_path):
    write(tmp_path / "a.jsonl", b'{"text": ""}\n' * 50)
    (tmp_path / "b.jsonl.zst").write_bytes(b"no zstd")
    damage = Damage()
    assert texts(tmp_path, damage=damage) == []
    assert [e["file"] for e in damage.examples] == ["a.jsonl"] * 20 + ["b.jsonl.zst"]


def invalid_strings(texts):
    import pyarrow

    return pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())


def test_a_row_that_is_not_utf_8_is_one_damaged_record(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [b"%d" % i for i in range(700)]
    rows[300] = b"\xff"
    parquet.write_table(pyarrow.table({"text": invalid_strings(rows)}), tmp_path / "a.parquet")
    damage = Damage()
    assert texts(tmp_path, damage=damage) == [str(i) for i in range(700) if i != 300]
    assert damage.examples == [{"file": "a.parquet", "record": 301, "reason": "not UTF-8"}]
    damage = Damage()
    assert texts(tmp_path, Fields(("body",)), damage) == [] and damage.counts == {"missing key": 700}


@pytest.mark.parametrize("row_groups", [0, 1])
def test_an_empty_parquet_file_is_counted(tmp_path, row_groups):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    empty = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    with parquet.ParquetWriter(tmp_path / "a.parquet", empty.schema) as writer:
        for _ in range(row_groups):
            writer.write_table(empty)
    damage = Damage()
    assert texts(tmp_path, damage=damage) == [] and damage.counts == {"empty file": 1}


def test_a_parquet_file_of_one_row_group_is_not_held(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array([random.Random(i).randbytes(5000).hex() for i in range(8000)])
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path, compression="none", use_dictionary=False)
    del column
    pyarrow.default_memory_pool().release_unused()
    before = pyarrow.total_allocated_bytes()
    peak = max(
        pyarrow.total_allocated_bytes() for _ in formats.parquet_rows(path, 0, ["text"], lambda _: None)
    )
    assert path.stat().st_size > 80_000_000 and peak - before < 30_000_000


def zstd_frame(text, window_log):
    """One stored block; it declares a window of so many bits."""
    head = b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3])
    return head + (len(text) << 3 | 1).to_bytes(3, "little") + text


def test_zstd_made_with_a_long_window_is_read(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd_frame(line("a"), 31) + zstd_frame(line("b"), 28))
    assert texts(tmp_path) == ["a", "b"]


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.txt", "a.parquet"])
def test_only_what_is_wrong_with_one_file_is_damage(tmp_path, monkeypatch, name):
    """What a disk that fails would hide is not passed over: the rest of a file, and all files behind it."""
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow.parquet")
    write(tmp_path / name, line("a"))
    source = open_source(tmp_path, Fields())

    def reads(number):
        monkeypatch.setattr(lines_module, "open", failing(number), raising=False)
        monkeypatch.setattr(Path, "read_bytes", failing(number))
        monkeypatch.setattr("pyarrow.parquet.ParquetFile", failing(number))
        return [record.data for record in source.records((-1, 0), lambda _: None)]

    for number in (errno.ENOENT, errno.EACCES, errno.EISDIR):
        (why,) = reads(number)
        assert (why.reason, why.detail) == ("cannot be read", os.strerror(number))
    for number in (errno.EIO, errno.ESTALE):
        with pytest.raises(
            OSError, match=rf"{re.escape(name)}: .*; check the disk and run again: it goes"
        ) as caught:
            reads(number)
        assert caught.value.errno == number


def test_files_passed_over_are_counted_by_why(tmp_path):
    folder, linked = tmp_path / "corpus", tmp_path / "elsewhere"
    (folder / "sub/.hidden").mkdir(parents=True)
    linked.mkdir()
    write(folder / "A.JSONL", line("capitals"))
    write(linked / "b.Json", array([{"text": "linked"}]))
    write(folder / "C.jsonl.GZ", gzip.compress(line("packed")))
    (folder / "D.TXT").write_bytes(b"text")
    for name in ("a.csv", "b.jsonl.xz", "sub/c.CSV", "README", ".a.jsonl", "sub/.hidden/a.jsonl"):
        (folder / name).write_bytes(line("no"))
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing")
    (folder / "sub/again").symlink_to(folder)  # a loop
    (folder / "sub/link").symlink_to(linked)
    os.mkfifo(folder / "pipe.jsonl")
    source = open_source(folder, Fields())
    found = {r.file: r.category for r in source.records((-1, 0), lambda _: None)}
    assert found == {"A.JSONL": "A", "C.jsonl.GZ": "C", "D.TXT": "txt", "sub/link/b.Json": "b"}
    assert texts(folder) == ["capitals", "packed", "text", "linked"]
    assert dict(source.passed_over) == {
        ".csv": 2, ".xz": 1, "no ending": 1, "hidden file": 1, "broken link": 1, "not a regular file": 1,
    }  # fmt: skip
    assert unit("A.JSONL") == unit("C.jsonl.GZ") == "line"


def test_a_folder_of_other_files_says_what_it_holds(tmp_path):
    write(tmp_path / "a.csv", b"")
    with pytest.raises(
        ValueError, match=r"holds no file ending in .*, but 1 x \.csv; name another, or convert"
    ):
        open_source(tmp_path, Fields())


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", line("a"))
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)  # as root, no folder refuses itself
    with pytest.raises(
        PermissionError, match=r"folder .*closed cannot be read .*; make it readable, or move it out"
    ):
        open_source(tmp_path, Fields())


def test_categories_of_numbers_and_null(tmp_path):
    for value in ("null", "7", "0.5", "true", "[]"):
        write(tmp_path / f"{value}.jsonl", b'{"text": "x", "of": %s}\n' % value.encode())
    write(tmp_path / "missing.jsonl", line("x"))
    damage = Damage()
    found = [d["meta"]["category"] for d in read(tmp_path, Fields(("text",), "of"), damage)]
    assert found == ["0.5", "7", "none"] and damage.counts == {"missing key": 1, "not a string": 2}


def test_the_category_of_a_file_is_its_name_without_the_ending(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.b.parquet")
    write(tmp_path / "c.d.jsonl.zst", line("b"))
    assert [d["meta"]["category"] for d in read(tmp_path)] == ["a.b", "c.d"]
