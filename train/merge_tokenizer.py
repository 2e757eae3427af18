"""Adds one tokenizer's pieces to another, and rows for them to a model: a new language for a trained checkpoint.

python train/merge_tokenizer.py --base runs/tokenizer.model --add runs/zh.model --out runs/merged.model
python train/merge_tokenizer.py ... --checkpoint runs/NAME/checkpoints --out-model runs/merged
"""

from __future__ import annotations

import argparse
from pathlib import Path

from openllama import cli


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="tokenizer.model whose ids stay as they are")
    parser.add_argument("--add", required=True, help="SentencePiece BPE model whose pieces are added")
    parser.add_argument("--out", required=True, help="where to write the merged model: a new file")
    parser.add_argument(
        "--max-pieces", type=int, help="add at most so many; the added model's last merges go first"
    )
    parser.add_argument("--text", help="a file of plain text: prints its bytes per token before and after")
    parser.add_argument("--checkpoint", help="a model trained with --base; needs --out-model")
    parser.add_argument("--out-model", help="where to write the model with the larger tables: a new folder")
    args = parser.parse_args()
    if (args.checkpoint is None) != (args.out_model is None):
        parser.error("--checkpoint and --out-model: got one, takes both or neither")
    return args


def main() -> None:
    args = arguments()
    from openllama.load import load_model
    from openllama.merge import check_tokenizer, grow, merge
    from openllama.pretrained import save_model
    from openllama.tokenizer import Tokenizer, bytes_per_token

    base, model = Tokenizer(args.base), None
    text = read_text(args.text) if args.text else ""
    if args.checkpoint:  # before the merge: what is wrong with it shall leave no file behind
        if Path(args.out_model).exists():
            raise FileExistsError(f"--out-model: {args.out_model} is there already; takes a new folder")
        model, found = load_model(args.checkpoint)
        check_tokenizer(args.checkpoint, found, base)
    merged, left_out = merge(args.base, args.add, args.out, args.max_pieces)
    added = merged.vocab_size - base.vocab_size
    print(f"wrote {args.out}: {merged.vocab_size:,} pieces, {added:,} of them new")
    if left_out:
        print(f"left out {len(left_out):,} that no text reaches, for example {left_out[0]!r}")
    if text:
        before, after = bytes_per_token(base, [text]), bytes_per_token(merged, [text])
        print(f"{args.text}: {before:.3f} bytes per token before, {after:.3f} after")
        ids = merged.encode(text)
        new = sum(i >= base.vocab_size for i in ids)
        print(f"{args.text}: {new:,} of its {len(ids):,} tokens are new pieces")
    if model is not None:
        grown = grow(model, base, merged)
        save_model(grown, args.out_model, args.out)
        before, after = model.config.vocab_size, grown.config.vocab_size
        print(f"wrote {args.out_model}: tables of {after:,} rows, {before:,} before")


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"--text: {path} is not UTF-8 ({e}), takes plain text") from None


if __name__ == "__main__":
    cli.run(main)
