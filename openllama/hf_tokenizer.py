"""Our SentencePiece tokenizer as HuggingFace's tokenizer.json: the same ids for every text.

SentencePiece merges, again and again, the neighbours whose union is the piece of the best score, the leftmost first; a
BPE of the `tokenizers` library does the same by a list of pairs in order. So each piece becomes all its splits into two
pieces, in the order of scores. Its mark for a space (U+2581) is turned back into a space in the vocabulary itself: no
normaliser is needed, and a real U+2581 in a text is spelled in bytes, as by `openllama.tokenizer`.

What differs: AutoTokenizer puts bos first, as in training (`add_special_tokens=False` gives our `encode`). Literal "<s>"
in a text is characters for AutoTokenizer too (`split_special_tokens` in tokenizer_config.json), but whoever reads
tokenizer.json with the `tokenizers` library alone gets the special id, unless `encode_special_tokens` is set there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from openllama.files import write_json
from openllama.tokenizer import SPACE_MARK, Tokenizer

PROBES = (
    "def f(x):\n\tif x:\n\t\treturn  1\r\n\n\n        # done\n",
    "  leading and trailing  ",
    "中文，日本語のテキスト 😀👍🏽 é e\u0301 \u2581 \0 <s></s><0x0A> 12345",
)


def special_ids(path: str | Path, vocab_size: int) -> dict[str, int | None]:
    """bos, eos and pad ids for config.json. Raises ValueError for a tokenizer with more ids than the model."""
    ours = Tokenizer(path)
    if ours.vocab_size > vocab_size:
        raise ValueError(
            f"{path}: has {ours.vocab_size} ids, takes at most the model's vocab_size={vocab_size}"
        )
    return {"bos_token_id": ours.bos_id, "eos_token_id": ours.eos_id, "pad_token_id": ours.pad_id}


def write(path: str | Path, folder: Path, max_positions: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and a copy of tokenizer.model into `folder`.

    Raises ValueError where the ids would not be the same (a model that is not our BPE).
    """
    ours = Tokenizer(path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    converted = convert(model)
    _check_same(ours, converted, model)
    converted.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": model.id_to_piece(model.unk_id()),
        "bos_token": model.id_to_piece(model.bos_id()),
        "eos_token": model.id_to_piece(model.eos_id()),
        "pad_token": model.id_to_piece(model.pad_id()),
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    write_json(folder / "tokenizer_config.json", config)
    shutil.copyfile(path, folder / "tokenizer.model")


def convert(model: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The same BPE in the `tokenizers` library, with bos put first and literal special tokens read as characters."""
    vocab, special, scores = {}, [], {}
    for i in range(model.get_piece_size()):
        piece = model.id_to_piece(i)
        if model.is_control(i) or model.is_unknown(i):
            special.append(piece)
        elif not model.is_byte(i):
            piece = piece.replace(SPACE_MARK, " ")
            scores[piece] = model.get_score(i)
        vocab[piece] = i
    bpe = models.BPE(
        vocab=vocab, merges=_merges(scores), unk_token=model.id_to_piece(model.unk_id()), byte_fallback=True
    )
    converted = tokenizers.Tokenizer(bpe)
    converted.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    converted.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    bos, bos_id = model.id_to_piece(model.bos_id()), model.bos_id()
    converted.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
    converted.encode_special_tokens = True
    return converted


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, the piece of the best score first."""
    merges = []
    for piece in sorted(scores, key=lambda p: -scores[p]):  # stable: equal scores stay in the order of ids
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                merges.append((piece[:cut], piece[cut:]))
    return merges


def _check_same(
    ours: Tokenizer, converted: tokenizers.Tokenizer, model: sentencepiece.SentencePieceProcessor
) -> None:
    """Compares ids on every piece of the vocabulary and on hard texts: other kinds of model fail here."""
    pieces = (
        i
        for i in range(ours.vocab_size)
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    )
    for text in (*PROBES, *(model.id_to_piece(i).replace(SPACE_MARK, " ") for i in pieces)):
        if converted.encode(text, add_special_tokens=False).ids != ours.encode(text):
            raise ValueError(
                f"{ours.path}: {text!r} gets other ids in HuggingFace's format, takes a BPE model made with "
                "train/train_tokenizer.py; export the weights without a tokenizer"
            )
