"""The tokenizer: SentencePiece BPE with byte fallback, set so that every text survives.

decode(encode(text)) == text for every string. How SentencePiece treats what is special to it (tried with 0.2.1 and 0.2.3):
- U+2581 is its own mark for a space and would decode to one, so the text is split there and its three UTF-8
  bytes are emitted.
- Tab separates sentences in training; it never becomes a piece, and encodes as the byte piece <0x09>.
- Newlines are ordinary characters: pieces such as ")\\n" and "\\n\\n" are learned.
- Literal "<s>" or "<0x0A>" in a text encodes as characters; special ids come only from the caller.
"""

from __future__ import annotations

import hashlib
import io
import re
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece

from openllama.files import file_written_aside

SPACE_MARK = "\u2581"
# What a training sentence must not hold: tab (sentence boundary), the marks for space and unknown, NUL.
UNTRAINABLE = re.compile("[\t\0\u2581\u2585]+")
SENTENCE = 4096  # characters; SentencePiece works on sentences, a document is cut into some at line ends
PROBE = f" a\t\r\n{SPACE_MARK}  \u4e2d\U0001f600 "


class Tokenizer:
    """A trained tokenizer.model. Ids of special tokens never come out of `encode`; the caller places them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path}: no such tokenizer; make it with train/train_tokenizer.py --out {path}"
            )
        model = self.path.read_bytes()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise ValueError(
                f"{self.path}: not a SentencePiece model ({e}); make it with train/train_tokenizer.py"
            ) from None
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.pad_id: int = self._model.pad_id()
        self._space_mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if min(self.bos_id, self.eos_id, self.pad_id) < 0 or self.decode(self.encode(PROBE)) != PROBE:
            raise ValueError(
                f"{self.path}: takes a model with bos, eos and pad ids, byte fallback, identity normalisation and "
                "no dummy prefix, else text does not survive; make it with train/train_tokenizer.py"
            )

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        return Tokenizer, (self.path,)  # for worker processes

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos. Raises ValueError for lone surrogates: no UTF-8 holds them."""
        try:
            if SPACE_MARK not in text:
                return self._model.encode(text)
            first, *rest = text.split(SPACE_MARK)
            ids = self._model.encode(first)
            for part in rest:
                ids += self._space_mark
                ids += self._model.encode(part)
            return ids
        # which of them depends on SentencePiece's release
        except (UnicodeEncodeError, RuntimeError, TypeError):
            if lone := re.search("[\ud800-\udfff]", text):
                raise ValueError(
                    f"text: character {lone.start()} is a lone surrogate, takes valid Unicode"
                ) from None
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids give nothing, bytes that are not UTF-8 give U+FFFD."""
        ids = [int(i) for i in ids]
        try:
            return self._model.decode(ids)
        except IndexError:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"ids: got {wrong}, takes 0 to {self.vocab_size - 1} ({self.path})") from None


def train(texts: Iterable[str], path: str | Path, vocab_size: int) -> Tokenizer:
    """Trains on `texts` (all held in memory: sample a large corpus first) and writes the model to `path`.

    BPE with byte fallback; digits are split; a piece may be all spaces, so indentation is cheap. Ids: unk 0,
    bos 1, eos 2, pad 3, bytes 4 to 259. Equal texts give an equal file. 20 MB of Python at 4,096 pieces take
    3 s on two cores. Once all texts are read, Ctrl-C ends the process at once.
    """
    if vocab_size <= 260:
        raise ValueError(f"vocab_size: got {vocab_size}, takes more than 260 (4 special ids and 256 bytes)")
    # read before SentencePiece starts, which would make an error of reading, or Ctrl-C, one of its own
    sentences, model = deque(_sentences(texts)), io.BytesIO()
    popped = (sentences.popleft() for _ in range(len(sentences)))  # it keeps a copy; no need for two
    try:
        with _ctrl_c_at_once():
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=popped,
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                character_coverage=0.9999,  # rarer characters are spelled in bytes
                required_chars=SPACE_MARK,  # but a space must not be: its bytes would decode to U+2581
                split_digits=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                max_sentence_length=4 * SENTENCE,  # in bytes; longer ones would be dropped
                num_threads=4,  # stored in the model, so it must not follow the machine
                minloglevel=2,
            )
    except RuntimeError as e:
        raise ValueError(_explain(str(e), vocab_size)) from None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with file_written_aside(path) as file:
        file.write(model.getvalue())
    return Tokenizer(path)


@contextmanager
def _ctrl_c_at_once() -> Iterator[None]:
    """Python's own handler would wait until SentencePiece is done, which can take hours."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # a caller's own handler, or none in the background, stays
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of the texts, cut at line ends, of at most SENTENCE characters; and a space."""
    found = False
    for text in texts:
        for part in UNTRAINABLE.split(text):
            start = 0
            while start < len(part):
                end = start + SENTENCE
                if end < len(part):
                    end = part.rfind("\n", start, end) + 1 or end
                yield part[start:end]
                start, found = end, True
    if found:
        yield " "  # SentencePiece 0.2.1 ends the process when a required character does not occur


def _explain(error: str, vocab_size: int) -> str:
    if largest := re.search(r"value <= (\d+)", error):
        return f"vocab_size: got {vocab_size}, but this text gives at most {largest[1]} pieces; lower it"
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"vocab_size: got {vocab_size}, but the characters of this text take at least {smallest[1]}"
    if "sentences_.empty()" in error:
        return "texts: got no text, takes at least some words to learn pieces from"
    return f"texts: SentencePiece cannot train on them with vocab_size {vocab_size}: {error}"


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes of `texts` over the number of their tokens: how far the tokenizer compresses."""
    return compression(tokenizer, ({"text": t, "meta": {"category": ""}} for t in texts))["all"]


def compression(tokenizer: Tokenizer, documents: Iterable[dict[str, Any]]) -> dict[str, float]:
    """`bytes_per_token` of all documents, of each category, and of each language that `language` tells apart."""
    sums: dict[str, list[int]] = {"all": [0, 0]}
    for document in documents:
        text = document["text"]
        size, tokens = len(text.encode()), len(tokenizer.encode(text))
        category = document["meta"]["category"] or "(none)"
        for name in ("all", f"category {category}", f"language {language(text)}"):
            counts = sums.setdefault(name, [0, 0])
            counts[0] += size
            counts[1] += tokens
    if not sums["all"][1]:
        raise ValueError("texts: got no text, takes at least one token's worth")
    return {name: size / tokens for name, (size, tokens) in sorted(sums.items()) if tokens}


# Letters that tell a language, or at least a script; the first whose share of all letters is large enough names it.
_LETTERS = {
    "Japanese": (re.compile("[\u3041-\u30ff]"), 0.05),  # kana, always amid Chinese characters
    "Korean": (re.compile("[\uac00-\ud7a3]"), 0.2),
    "Chinese": (re.compile("[\u3400-\u9fff]"), 0.2),
    "Cyrillic script": (re.compile("[\u0400-\u04ff]"), 0.2),
    "Greek script": (re.compile("[\u0370-\u03ff]"), 0.2),
    "Arabic script": (re.compile("[\u0600-\u06ff]"), 0.2),
    "Hebrew script": (re.compile("[\u0590-\u05ff]"), 0.2),
    "Devanagari script": (re.compile("[\u0900-\u097f]"), 0.2),
    "Thai script": (re.compile("[\u0e00-\u0e7f]"), 0.2),
}
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")


def language(text: str) -> str:
    """The language that the letters of a text's first 4,096 characters tell: for statistics, not for filtering."""
    text = text[:4096]
    counts = {name: len(letters.findall(text)) for name, (letters, _) in _LETTERS.items()}
    total = sum(counts.values()) + len(_LATIN.findall(text))
    found = (name for name, (_, share) in _LETTERS.items() if counts[name] > share * total)
    return next(found, "Latin script" if total else "no letters")
