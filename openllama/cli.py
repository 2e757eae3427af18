"""The command `openllama`: info, summary, export, import; and how every script of ours ends on an error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

# torch is imported by the subcommands only, so that --help comes at once.

# What `import` calls the packages of our extras, and those that they bring along.
OPTIONAL = {
    "train": {
        "accelerate", "google", "huggingface_hub", "matplotlib", "psutil", "sentencepiece", "tokenizers", "transformers",
        "zstandard",
    },
    "data": {"datasets", "pyarrow"},
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: args.run(args))


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with `main`'s exit code: how a script of ours runs. See `exit_code`."""
    sys.exit(exit_code(main))


def exit_code(main: Callable[[], int | None]) -> int:
    """What `main` returns, or 1 after a user's error, which takes one line on stderr: `error: ...`.

    OPENLLAMA_DEBUG=1 shows the traceback too. Other exceptions are bugs of ours and keep theirs. So that a
    package that is not installed gets its line too, `main` itself imports what needs one.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `openllama summary 65b | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return 141  # what a shell says of a program that SIGPIPE ended
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; what takes long goes on from where it was when run again", file=sys.stderr)
        return 130  # what a shell says of a program that SIGINT ended
    except (ValueError, TypeError, OSError, FloatingPointError) as e:
        error, text = e, str(e)
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        extra = next((extra for extra, packages in OPTIONAL.items() if package in packages), None)
        if extra is None:
            raise
        error, text = e, f'{package} is not installed; pip install "openllama[{extra}]"'
    if os.environ.get("OPENLLAMA_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    print(f"error: {text}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openllama", description="Llama training on kernels of our own.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "info", help="what was built, and what each op uses on this machine and why"
    )
    command.set_defaults(run=_info)

    command = commands.add_parser("summary", help="the layers, shapes and parameters of a model")
    command.add_argument(
        "model", help="a preset (tiny, 125m, 1b, 7b, 13b, 33b, 65b, llama3-8b) or a config.json"
    )
    command.set_defaults(run=_summary)

    text = (
        "Writes a checkpoint as HuggingFace's LlamaForCausalLM. A stable embedding is folded into the table: logits stay "
        "equal, the head becomes untied, and `openllama import` can't undo it."
    )
    command = commands.add_parser("export", help="a checkpoint to a HuggingFace folder", description=text)
    command.add_argument("checkpoint", help="a run's checkpoints/ (the last step) or one step-* folder of it")
    command.add_argument("folder", help="new, empty, or an earlier export, which is replaced")
    command.add_argument("--tokenizer", help="tokenizer.model (default: the one in the checkpoint)")
    _add_dtype(command)
    command.set_defaults(run=_export)

    text = (
        "Reads a local HuggingFace folder of a Llama (safetensors). A stable embedding that was folded at export stays "
        "folded: the model comes back untied and without it, with equal logits."
    )
    command = commands.add_parser(
        "import", help="a HuggingFace folder to one that train/ reads", description=text
    )
    command.add_argument("folder", help="holds config.json and *.safetensors")
    command.add_argument("out", help="a new or empty folder")
    _add_dtype(command)
    command.set_defaults(run=_import)
    return parser


def _add_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as stored)"
    )


def _info(args: argparse.Namespace) -> None:
    from openllama.info import report

    print(report())


def _summary(args: argparse.Namespace) -> None:
    from openllama.summary import find_config, layer_table

    print(layer_table(find_config(args.model)))


def _export(args: argparse.Namespace) -> None:
    from openllama.hf import export_hf, exported_parameter_count
    from openllama.load import find_model, load_model

    source = find_model(args.checkpoint)
    model, tokenizer = load_model(source)
    tokenizer = args.tokenizer or tokenizer
    export_hf(model, args.folder, tokenizer, _dtype(args.dtype))
    print(f"{source} -> {args.folder}: {exported_parameter_count(model.config):,} parameters")
    if model.config.stable_embedding:
        print(
            "the stable embedding is folded into embed_tokens: equal logits, untied; import can't undo this"
        )
    if tokenizer is None:
        print(f"without a tokenizer: {source} holds no tokenizer.model; name one with --tokenizer")


def _import(args: argparse.Namespace) -> None:
    from openllama.files import read_json
    from openllama.hf import import_hf
    from openllama.hf_config import FOLDED
    from openllama.model import parameter_count
    from openllama.pretrained import TOKENIZER, save_model

    model = import_hf(args.folder, _dtype(args.dtype))
    tokenizer = Path(args.folder) / TOKENIZER
    save_model(model, args.out, tokenizer if tokenizer.is_file() else None)
    print(f"{args.folder} -> {args.out}: {parameter_count(model.config):,} parameters")
    if read_json(Path(args.folder) / "config.json").get(FOLDED):
        print("its stable embedding stays folded into the embedding table: the export can't be undone")
    if not tokenizer.is_file():
        print(f"without a tokenizer: {args.folder} holds no tokenizer.model (only SentencePiece is read)")


def _dtype(name: str | None):
    import torch

    return getattr(torch, name) if name else None


if __name__ == "__main__":
    sys.exit(main())
