"""A second language for a trained model: another tokenizer's pieces, and a row of the tables for each.

As Chinese-LLaMA did for an English Llama (Cui et al., "Efficient and Effective Text Encoding for Chinese LLaMA and
Alpaca", 2023), except for the new rows: each is the mean of the rows that spelled its text before, so that training
goes on from what the model knows of that text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from openllama.files import file_written_aside
from openllama.model import Llama
from openllama.tokenizer import SPACE_MARK, Tokenizer

ROWS = 64  # the tables grow to a multiple of this: matrix products are slow on odd sizes


def merge(
    base: str | Path, add: str | Path, out: str | Path, max_pieces: int | None = None
) -> tuple[Tokenizer, list[str]]:
    """Writes `base` with the pieces of `add` that it lacks to `out`.

    The ids of `base` stay. New pieces follow in the order of `add`, with scores below all of `base`: a text merges as
    before, and only then further. Special, byte and user-defined pieces of `add` are not taken.

    Args:
        base: a tokenizer.model of ours.
        add: any SentencePiece BPE model with byte fallback; of its settings nothing is taken.
        out: a new file.
        max_pieces: at most so many new ones, as if `add` had been trained smaller: its last merges go first, its
            characters (which would be spelled in bytes) last. None: all.

    Returns:
        The merged tokenizer, and the pieces left out because no text reaches them any more: merges of `base` come
        first and cut through them.

    Raises:
        FileNotFoundError, FileExistsError. ValueError: a model of another kind, or nothing to add.
    """
    if max_pieces is not None and max_pieces < 1:
        raise ValueError(f"max_pieces: got {max_pieces}, takes at least 1")
    if Path(out).exists():
        raise FileExistsError(f"{out}: is there already; takes a new file, name another")
    old, other = _read(base), _read(add)
    Tokenizer(base)  # for its own checks, which what is made of it passes too
    candidates = _new_pieces(old, other, max_pieces)
    reached = _reached(_extended(old, candidates), candidates)
    new = [piece for piece, is_reached in zip(candidates, reached) if is_reached]
    left_out = [_text(piece) for piece, is_reached in zip(candidates, reached) if not is_reached]
    if not new:
        raise ValueError(
            f"{add}: {base} has all of its pieces that a text can reach; takes a model trained on other text"
        )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with file_written_aside(out) as file:
        file.write(_extended(old, new).SerializeToString())
    return Tokenizer(out), left_out


def _read(path: str | Path) -> Any:
    """The protocol buffer of a BPE model with byte fallback."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such tokenizer; make it with train/train_tokenizer.py --out {path}"
        )
    # here, by name: it needs protobuf, of the extra `train`, and has no types
    definition = import_module("sentencepiece.sentencepiece_model_pb2")
    message = import_module("google.protobuf.message")
    try:
        model = definition.ModelProto.FromString(Path(path).read_bytes())
    except message.DecodeError as e:
        raise ValueError(
            f"{path}: not a SentencePiece model ({e}); make it with train/train_tokenizer.py"
        ) from None
    spec = model.trainer_spec
    if spec.model_type != spec.BPE or not spec.byte_fallback:
        kind = spec.ModelType.Name(spec.model_type)
        raise ValueError(
            f"{path}: got a model of type {kind} with{'' if spec.byte_fallback else 'out'} byte fallback, takes BPE "
            "with it; make one with train/train_tokenizer.py"
        )
    return model


def _new_pieces(old: Any, other: Any, max_pieces: int | None) -> list[str]:
    """Normal pieces of `other` that `old` lacks: merges, the best score first, then characters."""
    known = {piece.piece for piece in old.pieces}
    new = [p for p in other.pieces if p.type == p.NORMAL and p.piece not in known]
    new = [p.piece for p in sorted(new, key=lambda p: -p.score)]
    merges = [piece for piece in new if len(piece) > 1]
    characters = [piece for piece in new if len(piece) == 1]
    if max_pieces is not None:
        merges = merges[: max(0, max_pieces - len(characters))]
    return (merges + characters)[:max_pieces]


def _extended(old: Any, new: Sequence[str]) -> Any:
    """A copy of `old` with these pieces, each scored below what is before it."""
    model = type(old)()
    model.CopyFrom(old)
    lowest = min(p.score for p in old.pieces if p.type == p.NORMAL)
    for i, piece in enumerate(new, 1):
        model.pieces.add(piece=piece, score=lowest - i)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model


def _reached(model: Any, new: Sequence[str]) -> list[bool]:
    """Whether each of the last pieces of `model` is what its own text encodes to.

    Where it is not, no text gives that piece: whether it comes together depends on nothing outside of it. So a model
    without it encodes every text the same.
    """
    encoder = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    first = len(model.pieces) - len(new)
    return [encoder.encode(_text(piece)) == [i] for i, piece in enumerate(new, first)]


def _text(piece: str) -> str:
    return piece.replace(SPACE_MARK, " ")


def check_tokenizer(checkpoint: str | Path, found: Path | None, base: Tokenizer) -> None:
    """Raises ValueError unless `found`, the tokenizer.model of `checkpoint`, is `base`, byte for byte."""
    if found is None:
        raise ValueError(
            f"{checkpoint}: holds no tokenizer.model, takes one equal to {base.path}; copy the one that the model was "
            "trained with into it"
        )
    own = Tokenizer(found)
    if own.fingerprint != base.fingerprint:
        raise ValueError(
            f"{checkpoint}: made with the tokenizer {own.fingerprint[:12]}, takes {base.fingerprint[:12]} "
            f"({base.path}); merge into {found} instead"
        )


def grow(model: Llama, old: Tokenizer, new: Tokenizer) -> Llama:
    """`model` with tables for `new`, which `merge` made of `old`, its tokenizer.

    A new piece's row is the mean, taken in fp32, of the rows of the ids that `old` gives for its text; of the embedding
    and, where it is not tied, of the head. Rows of old ids keep their bits. The tables get a multiple of 64 rows; those
    beyond `new` hold the mean of all old rows, so that their logit is the mean of the old ones. (Zeros would have logit
    0, more than most ids get from a trained model, and so a large part of the softmax, for ids that are never labels.)

    Returns:
        A model of the same dtype and device, with its padded `vocab_size` in its config. It shares all weights but the
        tables with `model`.

    Raises:
        ValueError: `old` has more ids than the model, or `new` does not start with the pieces of `old`.
    """
    if old.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{old.path}: has {old.vocab_size} ids, takes at most the model's vocab_size={model.config.vocab_size}"
        )
    if new.vocab_size <= old.vocab_size or any(
        new.decode([i]) != old.decode([i]) for i in range(old.vocab_size)
    ):
        raise ValueError(f"{new.path}: does not go on from {old.path}; takes a merge of it")
    spelled = [old.encode(new.decode([i])) for i in range(old.vocab_size, new.vocab_size)]
    config = dataclasses.replace(model.config, vocab_size=-(-new.vocab_size // ROWS) * ROWS)
    state = model.state_dict()
    for name in ("embed.weight",) if config.tied else ("embed.weight", "head.weight"):
        state[name] = _grown(state[name][: old.vocab_size], spelled, config.vocab_size)
    if config.tied:
        state["head.weight"] = state["embed.weight"]
    with torch.device("meta"):
        grown = Llama(config)
    grown.load_state_dict(state, assign=True)
    if config.tied:  # to assign gives each module a weight of its own
        grown.head.weight = grown.embed.weight
    return grown


def _grown(table: torch.Tensor, spelled: Sequence[Sequence[int]], rows: int) -> torch.Tensor:
    """`table`, (ids, hidden), with a row for each of `spelled` and padding: (rows, hidden)."""
    grown = table.new_empty(rows, table.shape[1])
    grown[: len(table)] = table
    for i, ids in enumerate(spelled, len(table)):
        grown[i] = table[ids].mean(0, dtype=torch.float32)
    grown[len(table) + len(spelled) :] = table.mean(0, dtype=torch.float32)
    return grown
