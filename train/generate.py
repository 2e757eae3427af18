"""Text from a checkpoint.

python train/generate.py --checkpoint runs/quickstart/checkpoints --prompt "def main" --temperature 0.8 --top-k 50
"""

from __future__ import annotations

import argparse
import sys
import time

from openllama import cli


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run's checkpoints/, one step-* folder of it, or a HuggingFace export",
    )
    parser.add_argument(
        "--prompt", action="append", help="text to go on from; give it again for more samples (default: none)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, help="for each prompt (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest token (default: 0.8)"
    )
    parser.add_argument("--top-k", type=int, default=50, help="only the k likeliest; 0: all (default: 50)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="only the likeliest p; 1: all (default: 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="text that ends a sample; give it again for more (default: none)",
    )
    parser.add_argument("--tokenizer", help="tokenizer.model (default: the one in the checkpoint)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    from openllama.generate import generate
    from openllama.load import load_model
    from openllama.tokenizer import Tokenizer

    device = find_device(args.device)
    model, tokenizer_path = load_model(args.checkpoint, device=device)
    tokenizer_path = args.tokenizer or tokenizer_path
    if tokenizer_path is None:
        raise ValueError(f"{args.checkpoint}: holds no tokenizer.model; name one with --tokenizer")
    tokenizer = Tokenizer(tokenizer_path)
    prompts = args.prompt or [""]
    alone = len(prompts) == 1  # then its text is shown as it comes
    unsaid = prompts[:1]  # shown with the first of its text: an error before that stands on a line of its own

    def show(_: int, piece: str) -> None:
        print(*unsaid, piece, sep="", end="", flush=True)
        unsaid.clear()

    times: list[list[float]] = [[] for _ in prompts]  # when each token came
    start = time.perf_counter()
    texts = generate(
        model,
        tokenizer,
        prompts,
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        args.seed,
        args.stop,
        on_text=show if alone else None,
        on_token=lambda i, _: times[i].append(time.perf_counter()),
    )
    end = time.perf_counter()
    if alone:
        print(*unsaid)
    else:
        for i, (prompt, text) in enumerate(zip(prompts, texts), 1):
            print(f"--- sample {i}\n{prompt}{text}")
    print(f"[{speed(times, start, end)} on {device}]", file=sys.stderr)


def speed(times: list[list[float]], start: float, end: float) -> str:
    """How many tokens, and how fast: to each prompt's first, which waits for the prompts to be read, and after those."""
    firsts = [t[0] for t in times if t]
    count, read = sum(map(len, times)), max(firsts, default=end)
    rest = count - len(firsts)
    after = f", then {rest / (end - read):.1f} tokens/s" if rest else ""
    return f"{count} tokens, the first after {read - start:.2f} s{after}"


def find_device(name: str | None):
    """torch's device of that name; None: a GPU where there is one. Raises ValueError for any other."""
    import torch

    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name is None:
        name = "cuda" if here else "cpu"
    if name not in ("cpu", *here) and not (name == "cuda" and here):
        raise ValueError(f"--device: got {name!r}, takes {' or '.join(['cpu', *here])} on this machine")
    return torch.device(name)


if __name__ == "__main__":
    cli.run(main)
