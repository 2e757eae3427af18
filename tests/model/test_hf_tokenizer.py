"""AutoTokenizer on an export: the ids of openllama.tokenizer for every text."""

import random
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openllama import tokenizer
from openllama.hf import export_hf, import_hf

from .models import make

STRINGS = [
    "",
    " ",
    "  leading and trailing  ",
    "runs    of     spaces",
    "def f(x):\n\tif x:\n\t\treturn  1\r\n\n\n        # done\n",
    "\n\n\n",
    "中文分词，没有空格。",
    "日本語のテキスト、カタカナ",
    "emoji 😀👍🏽👨‍👩‍👧 🇯🇵",
    "NUL \0 inside\0",
    "the mark \u2581 itself \u2581\u2581\n\u2581",
    "\ufeffBOM \u2028 \x85 \u200b \xa0 \ufffd \U0010ffff e\u0301 ﬁ Ａ",
    "<s></s><unk><pad><0x0A><0xE2><0x96><0x81>",
    "1234567890 3.14",
    "a" * 5000,
]


@pytest.fixture(scope="module")
def texts():
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [p.read_text(encoding="utf-8") for p in sorted(folder.glob("[a-d]*.py"))][:60]


@pytest.fixture(scope="module")
def pair(texts, tmp_path_factory):
    """Our tokenizer of 1,000 pieces, and AutoTokenizer on an export with it."""
    folder = tmp_path_factory.mktemp("export")
    ours = tokenizer.train(texts, folder / "tokenizer.model", 1000)
    export_hf(make(vocab_size=1000), folder / "hf", ours.path)
    return ours, AutoTokenizer.from_pretrained(folder / "hf"), folder / "hf"


def same(pair, text):
    ours, theirs, _ = pair
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
    assert theirs.decode(ids) == text, repr(text)


@pytest.mark.parametrize("text", STRINGS, ids=range(len(STRINGS)))
def test_ids_and_text_are_the_same(pair, text):
    same(pair, text)


def test_source_files(pair, texts):
    for text in texts:
        same(pair, text)


def test_fuzz(pair):
    rng = random.Random(0)
    parts = [
        *map(chr, range(0x250)),
        *" \n\t\r\u2581\u2585中文日本😀\u2028\ufeff" * 20,
        *STRINGS,
        "    ",
        "def f(",
    ]
    for _ in range(2000):
        same(pair, "".join(rng.choices(parts[: -len(STRINGS) - 2] + parts[-2:], k=rng.randrange(40))))


@pytest.mark.parametrize("alphabet", ["ab", "abc ", "a\n "])
def test_repetitive_text_merges_in_the_same_order(alphabet, tmp_path):
    """Few letters give pieces that can be reached by many merges: the leftmost of equals must come first."""
    rng = random.Random(1)
    ours = tokenizer.train(["".join(rng.choices(alphabet, k=2000)) for _ in range(30)], tmp_path / "m", 300)
    export_hf(make(vocab_size=300), tmp_path / "hf", ours.path)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for _ in range(1000):
        same((ours, theirs, None), "".join(rng.choices(alphabet, k=rng.randrange(60))))


def test_special_tokens(pair):
    ours, theirs, folder = pair
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (
        1,
        2,
        3,
        0,
    )
    assert theirs("x = 1").input_ids == [1, *ours.encode("x = 1")]  # as in training
    assert theirs.decode([1, *ours.encode(" x"), 2, 3], skip_special_tokens=True) == " x"
    config = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)


def test_known_limit_the_bare_library_reads_literal_special_tokens(pair):
    """tokenizer.json has no place for `encode_special_tokens`; a caller without transformers sets it."""
    ours, _, folder = pair
    bare = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert bare.encode("<s>", add_special_tokens=False).ids == [1] != ours.encode("<s>")
    bare.encode_special_tokens = True
    assert bare.encode("<s>", add_special_tokens=False).ids == ours.encode("<s>")


def test_the_sentencepiece_model_goes_along(pair):
    ours, _, folder = pair
    assert (folder / "tokenizer.model").read_bytes() == ours.path.read_bytes()
    import_hf(folder)


def test_batches_pad(pair):
    _, theirs, folder = pair
    batch = theirs(["x", "def f():\n"], return_tensors="pt", padding=True)
    assert batch.input_ids.shape == batch.attention_mask.shape
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(folder)(**batch).logits.isfinite().all()


def test_a_tokenizer_larger_than_the_model_is_refused(pair, tmp_path):
    with pytest.raises(ValueError, match=r"has 1000 ids, takes at most the model's vocab_size=101"):
        export_hf(make(), tmp_path / "hf", pair[0].path)
    assert not any(tmp_path.iterdir())


def test_another_kind_of_model_is_refused(texts, tmp_path):
    with open(tmp_path / "m", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts[0].splitlines()), model_writer=file, vocab_size=500, minloglevel=2, pad_id=3,
            model_type="unigram", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, hard_vocab_limit=False,
        )  # fmt: skip
    with pytest.raises(ValueError, match="gets other ids in HuggingFace's format, takes a BPE model"):
        export_hf(make(vocab_size=1000), tmp_path / "hf", tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
