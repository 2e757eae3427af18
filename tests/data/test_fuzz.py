"""Damaged files, 10,000 of them by seed: no crash, no hang, and nothing lost without a word."""

import gzip
import json
import random

import pytest
import zstandard

from openllama.data.documents import Damage, DamagedData
from openllama.data.shards import ShardWriter, read_shards

from .reading import texts

MUTATIONS = 2000  # of each kind of file
TEXTS = [
    f"document {i}: " + random.Random(i).choice(["plain", "中文字", '😀 \\ "}]', "[{"]) * (1 + i % 9)
    for i in range(24)
]


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to three of: bytes changed, cut out, put in, moved, or the end cut off."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data)) if data else 0
        size = draw.choice([1, 1, 2, 8, 64, 500])
        match draw.randrange(5):
            case 0:
                data = data[:at] + draw.randbytes(min(size, len(data) - at)) + data[at + size :]
            case 1:
                data = data[:at] + data[at + size :]
            case 2:
                data = data[:at] + draw.randbytes(size) + data[at:]
            case 3:
                data = data[:at] + data[at : at + size] * 2 + data[at + size :]
            case 4:
                data = data[:at]
    return data


def json_lines() -> bytes:
    return b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS)


COMPRESSED = {
    "a.jsonl.zst": lambda: zstandard.ZstdCompressor(write_checksum=True).compress(json_lines()),
    "a.jsonl.gz": lambda: gzip.compress(json_lines(), mtime=0),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_files_give_all_or_say_what_is_lost(tmp_path, name):
    """They carry checksums, so nothing can change unseen."""
    path, whole, draw = tmp_path / name, COMPRESSED[name](), random.Random(name)
    for _ in range(MUTATIONS):
        path.write_bytes(changed := mutate(whole, draw))
        damage = Damage()
        assert texts(path, damage=damage) == TEXTS or damage.counts, changed


def test_plain_lines_lose_no_record_without_a_word(tmp_path):
    """A changed letter can't be seen, nor an end cut off between two lines; any other line gives a document or a reason."""
    path, draw = tmp_path / "a.jsonl", random.Random("lines")
    for _ in range(MUTATIONS):
        path.write_bytes(changed := mutate(json_lines(), draw))
        damage = Damage()
        found = texts(path, damage=damage)
        records = sum(not line.isspace() for line in changed.split(b"\n") if line)
        assert len(found) + sum(damage.counts.values()) == (records if changed else 1), changed


def test_arrays_are_read_as_json_reads_them_or_say_what_is_lost(tmp_path):
    path, draw, whole = (
        tmp_path / "a.json",
        random.Random("array"),
        json.dumps([{"text": t} for t in TEXTS]).encode(),
    )
    for _ in range(MUTATIONS // 2):
        path.write_bytes(changed := mutate(whole, draw))
        damage = Damage()
        found = texts(path, damage=damage)
        try:
            records = json.loads(changed)
        except ValueError:
            assert damage.counts, changed
        else:
            assert len(records) == len(found) + sum(damage.counts.values()), changed


@pytest.mark.parametrize("more", [{}, {"parts": [{"n": 1}, {"n": "}, {"}]}])
def test_a_record_broken_in_an_array_costs_itself_and_at_most_the_one_behind(tmp_path, more):
    """One place of one record: its end cut off, some bytes cut out, or a character of JSON's own put in or over one."""
    path, draw = tmp_path / "a.json", random.Random("record")
    records = [json.dumps({"text": t, **more}, ensure_ascii=False).encode() for t in TEXTS]
    for _ in range(MUTATIONS // 4):
        i = draw.randrange(len(records) - 1)
        at, record = draw.randrange(len(records[i])), records[i]
        cut = draw.choice([0, 1, 2, 8, len(record)])
        put = draw.choice([b"", *(bytes([c]) for c in b'"[]{},:\\')])
        broken = record[:at] + put + record[at + cut :]
        path.write_bytes(changed := b"[" + b", ".join([*records[:i], broken, *records[i + 1 :]]) + b"]")
        damage = Damage()
        found = set(texts(path, damage=damage))
        lost = {t for t in TEXTS if t not in found}
        assert lost <= set(TEXTS[i : i + 2]), changed
        assert damage.counts or not lost - {TEXTS[i]}, changed


def test_shards_are_whole_or_refused(tmp_path):
    with ShardWriter(tmp_path, {}) as writer:
        for text in TEXTS:
            writer.write({"text": text, "meta": {"category": "c"}})
    path, draw = tmp_path / "part-00000.jsonl.zst", random.Random(0)
    whole, refused = path.read_bytes(), 0
    for _ in range(MUTATIONS):
        path.write_bytes(changed := mutate(whole, draw))
        try:
            assert [d["text"] for d in read_shards(tmp_path)] == TEXTS, changed
        except (ValueError, DamagedData) as e:
            assert str(path) in str(e)
            refused += 1
    assert refused > 0.9 * MUTATIONS
