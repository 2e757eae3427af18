"""A Chinese vocabulary for a tokenizer of Python source, the model that goes with it, and train/merge_tokenizer.py."""

import sysconfig
from pathlib import Path

import pytest
import sentencepiece
import torch

from openllama import tokenizer
from openllama.generate import sample
from openllama.hf import export_hf
from openllama.load import load_model
from openllama.merge import check_tokenizer, grow, merge
from openllama.pretrained import save_model
from openllama.tokenizer import Tokenizer

from .models import make

CHINESE = """\
春天来了，山上的雪慢慢地化成了水，流到山下的小河里。河边的树长出了新的叶子，鸟儿也从南方飞了回来。
村里的人们开始在田里工作，他们种下水稻和蔬菜，希望今年有一个好的收成。孩子们放学以后在河边玩，老人们坐在门前晒太阳。
我们的语言模型需要大量的文本来学习。文本越多，模型学到的知识就越多。中文的文本没有空格，所以分词对中文来说很重要。
分词器把一段文本分成许多小的单位，每一个单位对应一个数字。模型看到的不是文字，而是这些数字。
如果分词器不认识一个汉字，它就把这个汉字写成三个字节，这样一段中文文本会变得很长，模型的训练也会变得很慢。
因此人们常常把中文的词加到英文的分词器里，然后让模型在中文文本上继续训练。训练以后，模型就能理解中文，也能用中文写作。
北京是中国的首都，上海是中国最大的城市。每年有很多人到北京和上海旅行，他们参观古老的建筑，也喜欢当地的食物。
从北京到上海坐火车只需要四个多小时，坐飞机需要两个小时。很多人喜欢坐火车，因为在火车上可以看到外面的风景。
今天的天气很好，我们决定去公园走一走。公园里有一个很大的湖，湖上有几条小船。我们租了一条小船，在湖上划了一个小时。
晚上我们在一家小饭馆吃饭。饭馆的老板很热情，他告诉我们这个城市的历史和故事。我们听了很久，直到饭馆关门才回家。
"""
HARD = [
    "",
    " ",
    " 中文\t▁ 混 English\r\n\n",
    "😀 <s></s><0x0A> 龘",
    "def f(名字):\n    return 名字  # 注释\n",
]


def text_of(pattern):
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob(pattern))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """base.model of Python, zh.model of Chinese, and both merged."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizer.train(text_of("[a-b]*.py"), folder / "base.model", 1000)
    tokenizer.train([CHINESE * 4], folder / "zh.model", 700)
    _, left_out = merge(folder / "base.model", folder / "zh.model", folder / "merged.model")
    assert left_out == []
    return folder


@pytest.fixture(scope="module")
def base(files):
    return Tokenizer(files / "base.model")


@pytest.fixture(scope="module")
def merged(files):
    return Tokenizer(files / "merged.model")


def pieces(path):
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


# ---------------------------------------------------------------- the tokenizer


def test_ids_of_the_base_stay_and_new_pieces_follow_in_order(files):
    old, added, both = (pieces(files / f"{name}.model") for name in ("base", "zh", "merged"))
    assert both == old + [piece for piece in added if piece not in {*old}]
    assert len(both) > len(old) + 400


def test_every_new_piece_is_reached(base, merged):
    for i in range(base.vocab_size, merged.vocab_size):
        assert merged.encode(merged.decode([i])) == [i]


def test_every_text_survives(merged):
    for text in [*HARD, CHINESE, *text_of("c*.py"), "".join(map(chr, range(0x4E00, 0x9FFF)))]:
        assert merged.decode(merged.encode(text)) == text


def test_text_of_the_base_encodes_as_before(base, merged):
    """To the same ids where no new piece applies, and to hardly any others at all."""
    lines = [line for text in text_of("[c-d]*.py") for line in text.splitlines(keepends=True)]
    same = 0
    for line in lines:
        ids = merged.encode(line)
        if max(ids) < base.vocab_size:
            assert ids == base.encode(line)
            same += 1
    assert len(lines) > 10_000 and same > 0.999 * len(lines)


def test_chinese_takes_far_fewer_tokens(base, merged, files):
    rates = [tokenizer.bytes_per_token(t, [CHINESE]) for t in (base, merged, Tokenizer(files / "zh.model"))]
    assert rates[1] > 3 * rates[0] and rates[1] == pytest.approx(rates[2], rel=0.01)


def test_max_pieces_drops_the_last_merges_first(files, tmp_path, base):
    whole = pieces(files / "merged.model")[base.vocab_size :]
    characters = [piece for piece in whole if len(piece) == 1]
    most = len(characters) + 10
    fewer, left_out = merge(files / "base.model", files / "zh.model", tmp_path / "m", most)
    merges = [piece for piece in whole if len(piece) > 1]
    assert pieces(fewer.path)[base.vocab_size :] == merges[:10] + characters and not left_out
    least, _ = merge(files / "base.model", files / "zh.model", tmp_path / "n", 5)
    assert pieces(least.path)[base.vocab_size :] == characters[:5]


def test_pieces_that_the_base_cuts_through_are_left_out(tmp_path):
    """`bc` of the base comes before `ab` and `cd`, and no piece `abc` or `bcd` leads from there to `abcd`."""
    tokenizer.train(["bc bc bc a d\n" * 9], tmp_path / "base", 270)
    tokenizer.train(["abcd ab cd ab cd q\n" * 9], tmp_path / "add", 276)
    assert "bc" in pieces(tmp_path / "base") and {"ab", "cd", "abcd"} <= {*pieces(tmp_path / "add")}
    both, left_out = merge(tmp_path / "base", tmp_path / "add", tmp_path / "both")
    assert "abcd" in left_out and "ab" not in left_out
    assert "abcd" not in pieces(both.path) and both.decode(both.encode("abcd ab")) == "abcd ab"


def test_a_merge_is_exported_to_huggingface(files, tmp_path, merged):
    """Which compares the ids of every piece on the way."""
    export_hf(make(vocab_size=merged.vocab_size), tmp_path / "hf", files / "merged.model")


def test_errors_of_the_merge(files, tmp_path):
    good, add, out = files / "base.model", files / "zh.model", tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"none: no such tokenizer; make it with"):
        merge(good, tmp_path / "none", out)
    (tmp_path / "bad").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="bad: not a SentencePiece model"):
        merge(tmp_path / "bad", add, out)
    for kind, fallback, got in (
        ("unigram", True, "type UNIGRAM with byte"),
        ("bpe", False, "BPE without byte"),
    ):
        with open(tmp_path / kind, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(text_of("ast.py")[0].splitlines()),
                model_writer=file,
                model_type=kind,
                byte_fallback=fallback,
                vocab_size=400,
                minloglevel=2,
            )
        for first, second in ((tmp_path / kind, add), (good, tmp_path / kind)):
            with pytest.raises(ValueError, match=rf"{kind}: got a model of .*{got} fallback, takes BPE"):
                merge(first, second, out)
    with pytest.raises(ValueError, match=r"base\.model: .* has all of its pieces"):
        merge(good, good, out)
    with pytest.raises(ValueError, match="max_pieces: got 0, takes at least 1"):
        merge(good, add, out, 0)
    assert not out.exists()
    before = good.read_bytes()
    with pytest.raises(FileExistsError, match=r"base\.model: is there already; takes a new file"):
        merge(good, add, good)
    assert good.read_bytes() == before


def test_pieces_of_a_model_with_other_settings_are_taken(files, tmp_path, base):
    """SentencePiece's own: no pad, a dummy prefix, NFKC. Only its pieces are taken."""
    with open(tmp_path / "add", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CHINESE.splitlines()),
            model_writer=file,
            model_type="bpe",
            byte_fallback=True,
            vocab_size=650,
            minloglevel=2,
        )
    both, _ = merge(files / "base.model", tmp_path / "add", tmp_path / "both")
    assert both.vocab_size > base.vocab_size + 300 and both.pad_id == base.pad_id
    assert all(both.decode(both.encode(text)) == text for text in (*HARD, CHINESE))


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1000, 1100], ids=["exact", "padded"])
def test_tables_grow(kind, dtype, rows, base, merged, tmp_path, files):
    model = make(dtype, **kind, vocab_size=rows)
    grown, path = load_model(save_model(grow(model, base, merged), tmp_path / "m", files / "merged.model"))
    assert path is not None and Tokenizer(path).fingerprint == merged.fingerprint
    old, new = base.vocab_size, merged.vocab_size
    assert grown.config.vocab_size % 64 == 0 and 0 <= grown.config.vocab_size - new < 64
    assert (grown.head.weight is grown.embed.weight) == model.config.tied
    for before, after in (
        (model.embed.weight, grown.embed.weight),
        (model.head.weight, grown.head.weight),
    ):
        assert after.dtype == dtype and after.requires_grad and len(after) == grown.config.vocab_size
        assert torch.equal(before[:old], after[:old])
        for i in range(old, new, 7):
            ids = base.encode(merged.decode([i]))
            assert torch.equal(after[i], before[ids].float().mean(0).to(dtype))
        padding = before[:old].float().mean(0).to(dtype)
        assert torch.equal(after[new:], padding.expand_as(after[new:]))
    others = grown.state_dict()
    for name, value in model.state_dict().items():
        assert name in ("embed.weight", "head.weight") or torch.equal(value, others[name])


def test_logits_of_old_ids_stay(kind, base, merged):
    text = "def read(path):\n    return open(path).read()\n"
    ids = torch.tensor([base.encode(text)])
    assert ids.tolist() == [merged.encode(text)]
    model = make(**kind, vocab_size=base.vocab_size)
    grown = grow(model, base, merged)
    assert torch.equal(model.hidden_states(ids), grown.hidden_states(ids))
    assert torch.equal(model(ids), grown(ids)[..., : base.vocab_size])


def test_a_space_in_a_piece_is_spelled_as_one(base, tmp_path):
    """Not as the three bytes of SentencePiece's mark for it."""
    tokenizer.train(["zq zq zq vzq\n" * 9], tmp_path / "add", 272)
    both, _ = merge(base.path, tmp_path / "add", tmp_path / "both")
    i = pieces(both.path).index("▁zq")
    assert i >= base.vocab_size
    model = make(vocab_size=base.vocab_size)
    spelled = base.encode(" zq")
    assert base.decode(spelled) == " zq" and len(spelled) <= 3
    row = grow(model, base, both).embed.weight[i]
    assert torch.equal(row, model.embed.weight[spelled].mean(0))


def test_a_grown_model_learns_and_writes(base, merged):
    grown = grow(make(vocab_size=1000, tied=True), base, merged)
    ids = torch.tensor([merged.encode(CHINESE)[:50]])
    grown(ids, labels=ids).backward()
    assert grown.embed.weight.grad is not None and grown.embed.weight.grad[base.vocab_size :].any()
    new = sample(grown, [[merged.bos_id]], 20, vocab_size=merged.vocab_size)[0]
    assert len(new) == 20 and max(new) < merged.vocab_size
    merged.decode(new)


def test_errors_of_the_model(base, merged, files, tmp_path):
    with pytest.raises(ValueError, match="has 1000 ids, takes at most the model's vocab_size=900"):
        grow(make(vocab_size=900), base, merged)
    for old, new in ((merged, base), (Tokenizer(files / "zh.model"), base)):
        with pytest.raises(ValueError, match=r"does not go on from .*; takes a merge of it"):
            grow(make(vocab_size=2000), old, new)
    with pytest.raises(ValueError, match=r"mine: holds no tokenizer\.model, takes one equal to"):
        check_tokenizer("mine", None, base)
    with pytest.raises(ValueError, match=f"mine: made with .*{merged.fingerprint[:12]}, takes"):
        check_tokenizer("mine", merged.path, base)
    check_tokenizer("mine", base.path, base)


# ---------------------------------------------------------------- the script


@pytest.fixture
def run(files, tmp_path, monkeypatch, script):
    """The script on the files above, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    save_model(make(vocab_size=1000), tmp_path / "checkpoints/step-00000010", files / "base.model")

    def run(**options):
        given = {"base": files / "base.model", "add": files / "zh.model", "out": "m.model"} | options
        return script(
            "merge_tokenizer", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())
        )

    return run


def test_script(run, script, tmp_path):
    (tmp_path / "zh.txt").write_text(CHINESE, encoding="utf-8")
    done = run(checkpoint="checkpoints", out_model="mine", text="zh.txt")
    assert done.returncode == 0, done.stderr
    for words in (
        "wrote m.model: 1,4",
        "bytes per token before",
        "are new pieces",
        "wrote mine: tables of 1,",
    ):
        assert words in done.stdout, done.stdout
    path = load_model(tmp_path / "mine")[1]
    assert path is not None and path.read_bytes() == (tmp_path / "m.model").read_bytes()
    asked = ("--checkpoint", "mine", "--prompt", "中文", "--max-new-tokens", "5", "--device", "cpu")
    written = script("generate", *asked)
    assert written.returncode == 0 and written.stdout.startswith("中文"), written.stderr


def test_script_errors_leave_nothing_behind(run, tmp_path, files):
    for options, words in (
        ({"checkpoint": "checkpoints", "out_model": "checkpoints"}, "--out-model: checkpoints is there already"),
        ({"checkpoint": "none", "out_model": "mine"}, "none: no such folder"),
        ({"checkpoint": "checkpoints", "out_model": "mine", "base": files / "zh.model"}, "checkpoints: made with"),
        ({"text": files / "zh.model"}, "zh.model is not UTF-8"),
        ({"out": files / "base.model"}, "base.model: is there already"),
    ):  # fmt: skip
        done = run(**options)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = run(checkpoint="checkpoints")
    assert done.returncode == 2 and "--checkpoint and --out-model: got one" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
