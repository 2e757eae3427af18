"""From raw text to batches, each step timed alone: `python -m benchmarks.data`. No GPU has a part in it.

The text is this machine's Python source, written as the Pile's files (jsonl.zst) and as WuDao's (JSON arrays), each
document COPIES times; the documents to pack have lengths drawn from a Pareto distribution, as web text has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from benchmarks import results
from openllama import cli
from openllama.data import pack, twin
from openllama.data.cache import TokenCache, tokenize
from openllama.data.loader import PackedLoader
from openllama.data.pool import cores
from openllama.data.prepare import CORPORA, prepare
from openllama.data.shards import read_shards
from openllama.tokenizer import train

FILES, COPIES = 32, 8  # of each corpus: several processes have work only where there is much to read
CONTEXT, BATCHES = 2048, (8, 64)
DOCUMENTS = 20_000_000  # to pack; a tenth of them for the twin
SECONDS = 2.0  # that the loader is read for


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    made = work()
    return time.perf_counter() - start, made


def row(
    bench: str, shape: dict[str, Any], seconds: float, count: float, unit: str, **more: Any
) -> dict[str, Any]:
    made = {
        "bench": bench,
        "shape": shape,
        "impl": "ours",
        "ms": seconds * 1e3,
        "rate": count / seconds,
        "unit": unit,
    }
    return {**made, **more}


def process_counts() -> list[int]:
    """1, 2, 4, ... up to the cores that there are."""
    return [1 << i for i in range(cores().bit_length())]


def raw_files(texts: list[str], folder: Path) -> None:
    """The same documents as the Pile's files and as WuDao's."""
    for kind in CORPORA:
        (folder / kind).mkdir()
    for i in range(FILES):
        mine = texts[i % (FILES // COPIES) :: FILES // COPIES]
        pile = b"".join(
            json.dumps({"text": t, "meta": {"pile_set_name": f"set {n % 5}"}}).encode() + b"\n"
            for n, t in enumerate(mine)
        )
        (folder / "pile" / f"{i:02d}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(pile))
        wudao = [{"title": t[:20], "content": t, "dataType": f"类 {n % 5}"} for n, t in enumerate(mine)]
        (folder / "wudao" / f"part-{i}.json").write_text(json.dumps(wudao, ensure_ascii=False, indent=1))


def preparing(folder: Path) -> Iterator[dict[str, Any]]:
    """MB of UTF-8 text a second, from raw files to training and held-out shards."""
    for kind, corpus in CORPORA.items():
        for processes in process_counts():
            out = folder / f"{kind}-{processes}"
            seconds, made = timed(
                lambda k=kind, o=out, p=processes, f=corpus.fields: prepare(
                    folder / k, o, fields=f, processes=p, progress=False
                )
            )
            shape = {"files": "jsonl.zst" if kind == "pile" else "json", "processes": processes}
            yield row("prepare", shape, seconds, made["text_bytes"] / 1e6, "MB/s")


def tokenising(folder: Path, vocab: int) -> Iterator[dict[str, Any]]:
    shards = folder / "source" / "train"
    texts = (document["text"] for document in read_shards(shards))
    tokenizer = train(texts, folder / "tokenizer.model", vocab)
    for processes in process_counts():
        seconds, cache = timed(
            lambda p=processes: tokenize(
                shards, tokenizer, folder / f"tokens-{p}", processes=p, progress=False
            )
        )
        shape = {"vocab": vocab, "processes": processes}
        yield row(
            "tokenise",
            shape,
            seconds,
            cache.tokens,
            "tokens/s",
            tokens_per_core=cache.tokens / seconds / processes,
        )


def packed(
    work: Callable[[np.ndarray, np.ndarray, int], pack.Packs], tokens: np.ndarray
) -> tuple[float, float]:
    """Seconds, and the share of padding."""
    start = np.cumsum(tokens) - tokens
    seconds, packs = timed(lambda: work(start, tokens, CONTEXT))
    return seconds, float(1 - packs.length.sum() / CONTEXT / (len(packs.first) - 1))


def packing(cache: TokenCache) -> Iterator[dict[str, Any]]:
    tokens = (np.random.default_rng(0).pareto(1.1, DOCUMENTS) * 100).astype(np.int64) + 2
    for impl, work, documents in (
        ("ours:native", pack.pack, DOCUMENTS),
        ("ours:native", pack.pack, DOCUMENTS // 10),
        (
            "ours:numpy",
            lambda start, n, context: pack.Packs(*twin.pack(start, n, context, "split")),
            DOCUMENTS // 10,
        ),
    ):
        seconds, padding = min(packed(work, tokens[:documents]) for _ in range(2))
        shape = {"documents": documents, "context": CONTEXT}
        yield row("pack", shape, seconds, documents, "documents/s", padding=padding) | {"impl": impl}
    seconds, loader = timed(lambda: PackedLoader(cache, CONTEXT, 1))
    shape = {"documents": len(cache), "context": CONTEXT, "of": "the text"}
    yield row("pack", shape, seconds, len(cache), "documents/s", padding=loader.padding_share)


def loading(cache: TokenCache) -> Iterator[dict[str, Any]]:
    """Labels a second into batches of tensors, on one core."""
    for batch in BATCHES:
        loader = PackedLoader(cache, CONTEXT, batch)
        next(loader)
        start, targets = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < SECONDS:
            targets += next(loader).targets
        yield row("load", {"context": CONTEXT, "batch": batch}, seconds, targets, "tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-bytes", type=int, default=200_000_000, help="of text (default: 200 MB)")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare("python", folder / "source", args.max_bytes, 0, progress=False)
        raw_files([d["text"] for d in read_shards(folder / "source" / "train")], folder)
        for made in (*preparing(folder), *tokenising(folder, args.vocab_size)):
            rows.append(show(made))
        cache = TokenCache(folder / "tokens-1")
        for made in (*packing(cache), *loading(cache)):
            rows.append(show(made))
    torch.set_num_threads(cores())
    print(f"stored in {results.write(f'data-{cores()}-cores', rows, torch.device('cpu'))}")


def show(made: dict[str, Any]) -> dict[str, Any]:
    shape = ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in made["shape"].items())
    padding = f", padding {made['padding']:.2%}" if "padding" in made else ""
    print(
        f"{made['bench']:9} {made['impl']:12} {shape:50} {made['rate']:>14,.0f} {made['unit']}{padding}",
        flush=True,
    )
    return made


if __name__ == "__main__":
    cli.run(main)
