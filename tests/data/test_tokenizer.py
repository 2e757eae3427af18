import errno
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import sentencepiece

from openllama import tokenizer
from openllama.data.documents import DamagedData
from openllama.tokenizer import Tokenizer, bytes_per_token, compression, language, train

ROOT = Path(__file__).resolve().parents[2]
STRINGS = [
    "",
    " ",
    "  leading and trailing  ",
    "runs    of     spaces",
    "\ttab\t\ttabs\n\t\tindented",
    "\n",
    "\n\n\n",
    "line\n    four spaces\r\n        eight\r",
    "中文分词，没有空格。",
    "日本語のテキスト、カタカナ",
    "emoji 😀👍🏽👨‍👩‍👧 🇯🇵",
    "NUL \0 inside\0",
    "the mark \u2581 itself \u2581\u2581\n\u2581",
    "\u4e2d\u2581\u6587",
    "the unknown mark \u2585 and \u2047",
    "<s></s><unk><pad><0x0A><0xE2><0x96><0x81>",
    "\ufeffBOM \u2028 \u2029 \x85 \u200b \xa0 \ufffd \ufdd0 \U0010ffff",
    "e\u0301 \u00e9 ﬁ ① Ａ",  # nothing is normalised
    "a" * 20_000,
]


@pytest.mark.parametrize("text", STRINGS, ids=range(len(STRINGS)))
def test_round_trip(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert not {small.bos_id, small.eos_id, small.pad_id, 0} & {*ids}


def test_round_trip_of_source_files(small, texts):
    assert all(small.decode(small.encode(t)) == t for t in texts)


def test_round_trip_of_every_character(small):
    alphabet = [
        chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and unicodedata.category(chr(i)) != "Cn"
    ]
    for start in range(0, len(alphabet), 997):
        text = "".join(alphabet[start : start + 997])
        assert small.decode(small.encode(text)) == text
        assert small.decode(small.encode(text[::-1])) == text[::-1]


def test_round_trip_fuzz(small):
    rng = random.Random(0)
    parts = [
        *map(chr, range(0x250)),
        *" \n\t\r\u2581\u2585中文日本😀\u2028\ufeff" * 20,
        *STRINGS[9:16],
        "    ",
        "def f(",
    ]
    for _ in range(5000):
        text = "".join(rng.choices(parts, k=rng.randrange(30)))
        assert small.decode(small.encode(text)) == text, repr(text)


def test_text_after_special_tokens_survives(small):
    for text in (" leading", "\n  two", "\t", "\u2581x"):
        assert small.decode([small.bos_id, *small.encode(text), small.eos_id, small.pad_id]) == text


def test_special_ids_and_pieces(small):
    assert (small.vocab_size, small.bos_id, small.eos_id, small.pad_id) == (1000, 1, 2, 3)
    assert len(small.encode(" " * 8)) == 1  # indentation is cheap
    assert len(small.encode("1234")) == 4  # digits are split
    assert small.decode([small._space_mark[0]]) == "\ufffd"  # a lone byte


def test_training_is_deterministic(texts, tmp_path):
    first, again = (train(iter(texts[:10]), tmp_path / name, 400).path.read_bytes() for name in "ab")
    assert first == again
    assert Tokenizer(tmp_path / "a").fingerprint == Tokenizer(tmp_path / "b").fingerprint


def test_training_uses_text_around_tabs_marks_and_in_long_lines(tmp_path):
    made = train(["zebra\tzebra\u2581zebra\0zebra\u2585zebra" * 2000], tmp_path / "m", 267)
    assert len(made.encode("zebra")) < 5  # SentencePiece alone would skip such sentences and find no text


def test_spaces_survive_training_without_spaces(tmp_path):
    """Spelled in bytes, a space would come back as U+2581."""
    made = train(["没有空格的中文文本" * 1000, "一个 空格"], tmp_path / "m", 275)
    assert made.decode(made.encode(" 空 格  \u2581 ")) == " 空 格  \u2581 "


def test_literal_special_pieces_in_the_training_text(tmp_path):
    made = train(["<s> <0x0A> </s> <unk> <pad> hello\n" * 500], tmp_path / "m", 276)
    for text in ("<s>", "<0x0A>\n", "<unk> <pad>"):
        assert made.decode(made.encode(text)) == text and min(made.encode(text)) > 3


def test_text_too_small_names_the_largest_vocabulary(tmp_path):
    with pytest.raises(
        ValueError, match=r"vocab_size: got 4096, but this text gives at most (\d+) pieces"
    ) as caught:
        train(["hello world"], tmp_path / "m", 4096)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert train(["hello world"], tmp_path / "m", largest).vocab_size == largest


def test_training_errors(tmp_path):
    with pytest.raises(ValueError, match="takes more than 260"):
        train(["hello"], tmp_path / "m", 260)
    for nothing in ([], ["", "\t"]):
        with pytest.raises(ValueError, match="texts: got no text"):
            train(nothing, tmp_path / "m", 300)
    with pytest.raises(ValueError, match="take at least 1261"):
        train(["".join(map(chr, range(0x4E00, 0x4E00 + 1000)))], tmp_path / "m", 300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [DamagedData, KeyboardInterrupt])
def test_an_error_of_reading_comes_out_as_it_is(kind, texts, tmp_path):
    """SentencePiece would hand on only its text, in several lines, as an error of its own."""

    def failing():
        yield texts[0]
        raise kind("part-00000.jsonl.zst, line 2")

    with pytest.raises(kind, match=r"^part-00000\.jsonl\.zst, line 2$"):
        train(failing(), tmp_path / "m", 400)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_does_not_wait_for_sentencepiece(tmp_path):
    code = """
import random, sys
from openllama.tokenizer import train
def texts():
    draw = random.Random(0)
    for _ in range(4000):
        yield " ".join("".join(draw.choices("abcdefghij", k=8)) for _ in range(100))
    print("read", flush=True)
try:
    train(texts(), sys.argv[1], 30000)
finally:
    print("waited")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "m")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "read\n"
        time.sleep(0.3)  # it is in SentencePiece now, for seconds
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "" and process.returncode == -signal.SIGINT
    assert list(tmp_path.iterdir()) == []


def test_training_leaves_ctrl_c_as_it_was(tmp_path):
    train(["hello world"], tmp_path / "m", 271)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_keeps_the_older_model(texts, tmp_path, monkeypatch):
    before = train(texts[:3], tmp_path / "m", 400).fingerprint

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        train(texts[:3], tmp_path / "m", 410)
    assert Tokenizer(tmp_path / "m").fingerprint == before


def test_bad_files_ids_and_text(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none: no such tokenizer.*train_tokenizer\.py"):
        Tokenizer(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="bad: not a SentencePiece model"):
        Tokenizer(tmp_path / "bad")
    for wrong in (1000, -1):
        with pytest.raises(ValueError, match=f"ids: got {wrong}, takes 0 to 999"):
            small.decode([5, wrong])
    with pytest.raises(ValueError, match="text: character 2 is a lone surrogate"):
        small.encode("ab\ud800")


def test_a_model_that_loses_text_is_refused(tmp_path, texts):
    with open(
        tmp_path / "m", "wb"
    ) as file:  # SentencePiece's defaults: a dummy prefix, stripped spaces, NFKC
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts[0].splitlines()),
            model_writer=file,
            vocab_size=300,
            minloglevel=2,
            pad_id=3,
        )
    with pytest.raises(ValueError, match="else text does not survive"):
        Tokenizer(tmp_path / "m")


def test_bytes_per_token(small):
    assert bytes_per_token(small, ["1234", "中"]) == pytest.approx(7 / (4 + len(small.encode("中"))))
    with pytest.raises(ValueError, match="got no text"):
        bytes_per_token(small, [""])
    assert tokenizer.SPACE_MARK == "▁"


@pytest.mark.parametrize(
    "text, name",
    [
        ("def main(): return 0", "Latin script"),
        ("今天天气很好,我们去公园。", "Chinese"),
        ("今日は天気がいいです。", "Japanese"),
        ("오늘은 날씨가 좋다", "Korean"),
        ("Сегодня хорошая погода", "Cyrillic script"),
        ("# 注释\n" + "value = compute(value)\n" * 20, "Latin script"),
        ("1 + 2 = 3", "no letters"),
    ],
)
def test_languages_by_their_letters(text, name):
    assert language(text) == name


def test_compression_by_category_and_language(small):
    documents = [("ab", "x"), ("天气好", "y"), ("天", "y")]
    rates = compression(small, ({"text": t, "meta": {"category": c}} for t, c in documents))
    tokens = [len(small.encode(t)) for t, _ in documents]
    assert rates == {
        "all": 14 / sum(tokens),
        "category x": 2 / tokens[0],
        "category y": 12 / sum(tokens[1:]),
        "language Chinese": 12 / sum(tokens[1:]),
        "language Latin script": 2 / tokens[0],
    }


def test_no_category_is_said_so(small):
    documents = [{"text": "ab", "meta": {"category": c}} for c in ("", "x")]
    assert {*compression(small, documents)} >= {"category (none)", "category x"}


def train_tokenizer(*arguments):
    command = [sys.executable, ROOT / "train" / "train_tokenizer.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_the_script_measures_on_text_it_was_not_trained_on(texts, shards_of, tmp_path):
    lines = [line + "\n" for text in texts for line in text.split("\n\n") if line.strip()]
    done = train_tokenizer("--shards", shards_of(lines), "--vocab-size", "400", "--out", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    _, *report = done.stdout[done.stdout.index("wrote") :].splitlines()
    assert report[0].startswith("bytes per token, of 0.0 MB of text that it was not trained on:")
    assert [line[11:] for line in report[1:]] == ["all", "category test", "language Latin script"]
    done = train_tokenizer(
        "--shards", shards_of(["hello"], "b"), "--vocab-size", "265", "--out", tmp_path / "m"
    )
    assert done.returncode == 0 and "bytes per token: not counted" in done.stdout, done.stderr


def test_the_script_names_a_damaged_shard_in_one_line(shards_of, tmp_path):
    folder = shards_of(["hello world"] * 50)
    part = folder / "part-00000.jsonl.zst"
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = train_tokenizer("--shards", folder, "--vocab-size", "300", "--out", tmp_path / "m")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {part}, line 1: not zstd, or corrupt"), done.stderr
