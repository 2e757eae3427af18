"""Text from a model: stop strings and pieces that come as they are sure."""

import random
import sysconfig
from pathlib import Path

import pytest

from openllama import generate as module
from openllama import tokenizer
from openllama.generate import generate, sample

from .models import make

TEXT = "def f(x):\n\treturn '中文，没有空格。' + \"😀👍🏽\" \ufffd ▁  # done\n"


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """400 pieces of English: Chinese and emoji are spelled in bytes."""
    text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text(encoding="utf-8")
    return tokenizer.train([text], tmp_path_factory.mktemp("t") / "tokenizer.model", 400)


@pytest.fixture(scope="module")
def model():
    return make(vocab_size=400, max_positions=64)


@pytest.fixture
def write(monkeypatch, spm, model):
    """generate(), whose draws are given: prompt i gets the i-th list of ids. Also gives the pieces of each."""

    def run(scripts, prompts=None, **options):
        left = [iter(script) for script in scripts]
        pieces = [[] for _ in scripts]

        def draw(*arguments):
            return [next(left[g.initial_seed()], spm.eos_id) for g in arguments[-1]]

        monkeypatch.setattr(module, "_draw", draw)
        prompts = prompts or [""] * len(scripts)
        count = max(map(len, scripts))
        texts = generate(
            model, spm, prompts, count, on_text=lambda i, piece: pieces[i].append(piece), **options
        )
        assert texts == ["".join(p) for p in pieces] and all(map(all, pieces))
        return texts, pieces

    return run


def cut(text, stop):
    """By definition: a character at a time, up to the first end of a stop string."""
    for end in range(len(text) + 1):
        for s in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(s):
                return text[: end - len(s)]
    return text


def ids_of(spm, text):
    return [*spm.encode(text), spm.eos_id]


def test_the_draws_are_those_of_sample(model, spm):
    prompts = ["def f", "", "中"]
    ids = [[spm.bos_id, *spm.encode(p)] for p in prompts]
    options = {"temperature": 0.9, "top_k": 300, "top_p": 0.99, "seed": 3}
    new = sample(model, ids, 30, eos_id=spm.eos_id, **options)
    texts = generate(model, spm, prompts, 30, **options)
    assert [p + t for p, t in zip(prompts, texts)] == [spm.decode([*a, *b]) for a, b in zip(ids, new)]
    seen = [[], [], []]
    generate(model, spm, prompts, 30, **options, on_token=lambda i, token: seen[i].append(token))
    assert seen == new
    assert generate(model, spm, prompts, 0) == ["", "", ""]


def test_on_token_ends_a_prompt(write, spm):
    ids = spm.encode("return x")
    texts, _ = write([ids, ids], on_token=lambda i, token: i == 0 and token == ids[1])
    assert texts == [spm.decode(ids[:2]), "return x"]


def test_a_character_of_several_tokens_comes_whole(write, spm):
    assert len(spm.encode("中")) == 3 and len(spm.encode("😀")) == 4
    (text,), (pieces,) = write([ids_of(spm, TEXT)])
    assert text == TEXT
    assert {"中", "文", "😀", "👍", "🏽"} <= set(pieces)
    # each comes with its last token, but the replacement character, which waits for the next
    (_, pieces) = write([spm.encode("a中b\ufffdc😀")])
    assert pieces == [["a", "中", "b", "\ufffdc", "😀"]]


def test_broken_characters_become_replacement_characters(write, spm):
    first, second, _ = spm.encode("中")
    x = spm.encode("x")
    (text,), (pieces,) = write([[first, second, *x, second, first]])
    assert text == spm.decode([first, second, *x, second, first]) == "\ufffd\ufffdx\ufffd\ufffd"
    assert pieces == ["\ufffd\ufffdx", "\ufffd\ufffd"]


@pytest.mark.parametrize(
    "stop, expected",
    [
        (["return"], "def f(x):\n\t"),
        (["turn '中文，"], "def f(x):\n\tre"),  # its end, inside a token or a run of bytes
        (["没有", "文"], "def f(x):\n\treturn '中"),
        (["👍"], TEXT[: TEXT.index("👍")]),
        (["▁", "# done"], TEXT[: TEXT.index("▁")]),
        (["never", "return '文", "# done\n\n"], TEXT),  # ends inside the start of one
        (["d"], ""),
        (["n '", "turn '中", "'"], "def f(x):\n\tretur"),  # the first to be whole
        (["n", "rn", "turn '"], "def f(x):\n\tretu"),  # the longest of those whole together
        (["\n\t", "\n"], "def f(x):"),
    ],
    ids=str,
)
def test_stop_strings(write, spm, stop, expected):
    assert cut(TEXT, stop) == expected
    assert write([ids_of(spm, TEXT)], stop=stop)[0] == [expected]
    by_character = [i for c in TEXT for i in spm.encode(c)]
    assert write([[*by_character, spm.eos_id]], stop=stop)[0] == [expected]


def test_stop_strings_inside_one_token(write, spm):
    token = max(range(260, 400), key=lambda i: len(set(spm.decode([i]))))
    text = spm.decode([token])
    assert len(set(text[:5])) == 5
    for stop in ([text[:4], text[1:3]], [text[1:3], text[:4]]):
        assert write([[token, token]], stop=stop)[0] == [text[:1]] == [cut(text, stop)]
    assert write([[token, token]], stop=[text[2:4], text[1:4], text[3:4]])[0] == [text[:1]]


def test_a_stop_string_ends_its_prompt_only(write, spm):
    seen = []
    ids = spm.encode("a = b\nc = d\n")
    texts, _ = write([ids, ids], ["x", "y"], stop=["\nc"], on_token=lambda i, token: seen.append(i))
    assert texts == ["a = b", "a = b"] and len(seen) < 2 * len(ids)
    other = spm.encode("e = f\ng = h\n")
    assert write([ids, [*other, spm.eos_id]], stop=["\nc"])[0] == ["a = b", "e = f\ng = h\n"]


def test_what_may_become_a_stop_string_waits(write, spm):
    ids = [i for c in "ab--c---d" for i in spm.encode(c)]
    assert write([ids], stop=["---"]) == (["ab--c"], [["a", "b", "--c"]])
    assert write([ids], stop=["--d"]) == (["ab--c-"], [["a", "b", "--c", "-"]])
    assert write([ids], stop=["de"]) == (["ab--c---d"], [[*"ab--c---", "d"]])  # the last d when all is over


@pytest.mark.parametrize("seed", range(40))
def test_any_ids_and_any_stop_strings(write, spm, seed):
    rng = random.Random(seed)
    kinds = [range(4, 260), range(260, 400), spm.encode(TEXT), [*range(4, 400), 0, spm.bos_id, spm.pad_id]]
    scripts = []
    for _ in range(3):
        script = []
        while len(script) < 50:
            kind = rng.choice(kinds)
            start = rng.randrange(len(kind))
            script += kind[start : start + rng.randrange(1, 9)] if rng.random() < 0.6 else [rng.choice(kind)]
        scripts.append(script)
    whole = [spm.decode(script) for script in scripts]
    prompts = ["x", "中", " \n"]
    assert whole == [spm.decode([*spm.encode(p), *s])[len(p) :] for p, s in zip(prompts, scripts)]
    assert write(scripts, prompts)[0] == whole
    starts = [rng.randrange(len(text) - 4) for text in whole]
    stop = [text[a : a + rng.randrange(1, 5)] for text, a in zip(whole, starts)]
    assert write(scripts, prompts, stop=stop)[0] == [cut(text, stop) for text in whole]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stop": ["x", ""]}, r"stop: got \['x', ''\], takes a list of strings that are not empty"),
        ({"stop": "x"}, "stop: got 'x', takes a list of strings"),
        ({"stop": [3]}, r"stop: got \[3\]"),
        ({"prompts": "x"}, "prompts: got 'x', takes a list of texts"),
        ({"prompts": [[1]]}, r"prompts: got \[\[1\]\], takes a list of texts"),
        ({"prompts": []}, r"prompts: got \[\]"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"max_new_tokens": -1}, "max_new_tokens: got -1"),
    ],
    ids=str,
)
def test_argument_errors(model, spm, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        generate(model, spm, **({"prompts": ["a"], "max_new_tokens": 1} | arguments))
