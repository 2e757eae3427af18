import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from openllama import tokenizer
from openllama.data import cache as cache_module
from openllama.data.cache import TokenCache, tokenize
from openllama.data.documents import DamagedData
from openllama.data.shards import ShardWriter
from openllama.files import sole_writer


@pytest.fixture
def build(shards_of, small, tmp_path):
    """Tokenises texts into `name`."""

    def build(texts, name="tokens", **options):
        return tokenize(
            shards_of(texts, f"{name}-shards"),
            options.pop("tokenizer", small),
            tmp_path / name,
            progress=False,
            **options,
        )

    return build


def content(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}


def test_each_document_is_bos_ids_eos(build, small, texts):
    made = build(texts)
    assert len(made) == len(texts) and made.tokens == made.lengths.sum()
    assert made.text_bytes == sum(len(t.encode()) for t in texts)
    assert (made.vocab_size, made.pad_id, made.ids.dtype) == (1000, 3, np.uint16)
    for i, text in enumerate(texts):
        assert made[i].tolist() == [small.bos_id, *small.encode(text), small.eos_id]
        assert made.lengths[i] == len(made[i])
    with pytest.raises(IndexError, match=f"document: got {len(texts)}, takes 0 to {len(texts) - 1}"):
        made[len(texts)]


def test_each_document_has_its_category(shards_of, small, tmp_path):
    folder = tmp_path / "shards"
    with ShardWriter(folder, {}) as writer:
        for text, category in (("one", "b"), ("zwei", "a"), ("three", "b")):
            writer.write({"text": text, "meta": {"category": category}})
    made = tokenize(folder, small, tmp_path / "tokens", progress=False)
    assert made.categories == {"b": 8, "a": 4} and made.category_of.tolist() == [0, 1, 0]


def test_the_process_count_does_not_matter(build, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BATCH_BYTES", 5000)  # many batches
    for processes in (1, 3):
        build(texts, str(processes), processes=processes)
    assert content(tmp_path / "1") == content(tmp_path / "3")
    with pytest.raises(ValueError, match="processes: got 0"):
        build(texts, "0", processes=0)


def test_workers_run_nothing_of_the_callers_script(shards_of, small, tmp_path):
    """No `__main__` guard, and a script of which each run would be seen."""
    shards = shards_of(["a text"] * 10)
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            print("run")
            from openllama.data.cache import tokenize
            from openllama.tokenizer import Tokenizer
            print(len(tokenize({str(shards)!r}, Tokenizer({str(small.path)!r}), {str(tmp_path / "t")!r}, processes=2,
                               progress=False)))
            """)
    )
    root = Path(cache_module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(root)}
    )
    assert (done.stdout, done.stderr) == ("run\n10\n", "")


@dataclass
class Wide:
    """Stands in for a tokenizer with a vocabulary beyond 16 bits."""

    vocab_size: int
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 3
    fingerprint: str = "wide"

    def encode(self, text):
        return [self.vocab_size - 1 - ord(c) % 2 for c in text]


@pytest.mark.parametrize("vocab_size, dtype", [(65536, np.uint16), (65537, np.uint32), (100_000, np.uint32)])
def test_ids_are_never_squeezed(build, vocab_size, dtype):
    made = build(["ab", "b"], str(vocab_size), tokenizer=Wide(vocab_size), processes=1)
    assert made.ids.dtype == dtype
    assert made[0].tolist() == [1, vocab_size - 2, vocab_size - 1, 2] and made[1].tolist() == [
        1,
        vocab_size - 1,
        2,
    ]


def test_reuse_and_a_changed_tokenizer_or_shard_set(shards_of, small, texts, tmp_path):
    first, other = shards_of(texts[:5], "first"), shards_of(texts[5:8], "other")
    out = tmp_path / "tokens"
    made = tokenize(first, small, out, progress=False)
    before = (out / "tokens.bin").stat().st_mtime_ns
    assert tokenize(first, small, out, progress=False).fingerprint == made.fingerprint
    assert (out / "tokens.bin").stat().st_mtime_ns == before
    new = tokenizer.train(texts[:9], tmp_path / "new.model", 500)
    with pytest.raises(
        ValueError,
        match=f"tokenizer {small.fingerprint[:12]}, but tokenizer is now {new.fingerprint[:12]}; "
        f"remove {out}, or choose another `out`",
    ):
        tokenize(first, new, out, progress=False)
    with pytest.raises(ValueError, match=r"shards \w{12}, but shards is now \w{12};"):
        tokenize(other, small, out, progress=False)
    assert (out / "tokens.bin").stat().st_mtime_ns == before


def interrupt(monkeypatch, after, error=KeyboardInterrupt):
    """Ends tokenising after so many batches."""
    encode, left = cache_module._encode, [after]

    def interrupted(*args):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return encode(*args)

    monkeypatch.setattr(cache_module, "_encode", interrupted)
    return lambda: monkeypatch.setattr(cache_module, "_encode", encode)


def test_a_failure_leaves_no_cache(build, tmp_path, monkeypatch):
    interrupt(monkeypatch, 0, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        build(["text"], processes=1)
    with pytest.raises(FileNotFoundError, match=r"no cache\.json"):
        TokenCache(tmp_path / "tokens")


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def test_goes_on_after_the_last_whole_shard_to_the_same_bytes(shards_of, small, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BATCH_BYTES", 5000)
    shards = shards_of(texts, lines_per_shard=6)
    whole = Counted(cache_module._encode)
    monkeypatch.setattr(cache_module, "_encode", whole)
    tokenize(shards, small, tmp_path / "whole", progress=False, processes=1)
    monkeypatch.setattr(cache_module, "_encode", whole.function)
    wanted, total = content(tmp_path / "whole"), whole.calls
    for stop in (3, total // 2, total - 1):
        out = tmp_path / str(stop)
        restore = interrupt(monkeypatch, stop)
        with pytest.raises(KeyboardInterrupt):
            tokenize(shards, small, out, progress=False, processes=1)
        restore()
        encode = cache_module._encode
        monkeypatch.setattr(cache_module, "_encode", counted := Counted(encode))
        tokenize(shards, small, out, progress=False, processes=1)
        monkeypatch.setattr(cache_module, "_encode", encode)
        assert content(out) == wanted
        assert total - stop <= counted.calls < total - stop + 12, "whole shards are not tokenised again"


def test_an_interrupted_run_of_another_tokenizer_or_of_lost_files_is_named(
    shards_of, small, texts, tmp_path, monkeypatch
):
    shards, out = shards_of(texts[:8], lines_per_shard=2), tmp_path / "out"
    restore = interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        tokenize(shards, small, out, progress=False, processes=1)
    restore()
    new = tokenizer.train(texts[:9], tmp_path / "new.model", 500)
    with pytest.raises(ValueError, match=r"made from tokenizer \w+, but tokenizer is now \w+; remove"):
        tokenize(shards, new, out, progress=False)
    (out / "tokens.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokens\.bin: journal\.json says at least \d+ bytes, got 0"):
        tokenize(shards, small, out, progress=False)


def test_a_full_disk_is_named_and_goes_on(shards_of, small, texts, tmp_path, monkeypatch):
    shards, out = shards_of(texts[:8], lines_per_shard=2), tmp_path / "out"
    sync, left = os.fsync, [9]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"{out}: the disk is full; free space and run again, it goes on"):
        tokenize(shards, small, out, progress=False, processes=1)
    monkeypatch.setattr(os, "fsync", sync)
    assert (out / "journal.json").exists()
    made = tokenize(shards, small, out, progress=False)
    assert [small.decode(made[i]) for i in range(8)] == texts[:8] and not (out / "journal.json").exists()


def test_one_run_at_a_time(shards_of, small, tmp_path):
    shards, out = shards_of(["one", "two"]), tmp_path / "tokens"
    with (
        sole_writer(out),
        pytest.raises(BlockingIOError, match=rf"{out}: another run is writing here; wait until"),
    ):
        tokenize(shards, small, out, progress=False)
    made = tokenize(shards, small, out, progress=False)
    with sole_writer(out):  # what is finished is read by any number
        assert len(tokenize(shards, small, out, progress=False)) == len(made) == 2


def test_a_shard_removed_while_it_is_tokenised_is_named(shards_of, small, texts, tmp_path, monkeypatch):
    shards = shards_of(texts[:8], lines_per_shard=2)
    encode = cache_module._encode

    def removing(*args):
        (shards / "part-00003.jsonl.zst").unlink(missing_ok=True)
        return encode(*args)

    monkeypatch.setattr(cache_module, "_encode", removing)
    with pytest.raises(DamagedData, match=r"part-00003\.jsonl\.zst, line 0: cannot be read"):
        tokenize(shards, small, tmp_path / "out", progress=False, processes=1)


def test_a_cache_without_its_keys_is_named_before_it_is_compared(build, small, tmp_path):
    made = build(["text"])
    index = made.path / "cache.json"
    index.write_text(json.dumps({k: v for k, v in made.meta.items() if k != "tokenizer"}))
    with pytest.raises(
        ValueError, match=r"cache\.json: no key 'tokenizer'; damaged: copy or make its folder"
    ):
        tokenize(tmp_path / "tokens-shards", small, made.path, progress=False)


def test_damaged_caches_are_named(build, tmp_path):
    folder = build(["some text", "more"]).path
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    for name, data, message in (
        ("tokens.bin", whole["tokens.bin"][:-2], r"tokens\.bin: cache\.json says \d+ bytes, got \d+"),
        ("offsets.bin", whole["offsets.bin"][:-8], r"offsets\.bin: cache\.json says \d+ bytes, got \d+"),
        ("offsets.bin", bytes(len(whole["offsets.bin"])), r"offsets\.bin: does not fit cache\.json"),
        ("categories.bin", b"", r"categories\.bin: cache\.json says 4 bytes, got 0"),
        ("cache.json", b"{", r"cache\.json: not valid JSON"),
        ("cache.json", b'{"version": 2}', r"cache\.json: no key 'tokens'; damaged"),
        ("cache.json", json.dumps({"version": 7}).encode(), r"cache\.json: got version 7, takes 2"),
    ):
        (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            TokenCache(folder)
        (folder / name).write_bytes(whole[name])
    (folder / "tokens.bin").unlink()
    with pytest.raises(ValueError, match=r"tokens\.bin: .* got no such file"):
        TokenCache(folder)
    with pytest.raises(FileNotFoundError, match=r"no cache\.json"):
        TokenCache(tmp_path / "none")
