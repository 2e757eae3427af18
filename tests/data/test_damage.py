"""Damaged sources: named, counted, and the rest is used."""

import os
import random
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from openllama.data.documents import Damage, Fields
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
    """4 GB of zeros in 400 KB."""
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    with (tmp_path / "a.jsonl.zst").open("wb") as file:
        block = bytes(1 << 24)
        for _ in range(256):
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
