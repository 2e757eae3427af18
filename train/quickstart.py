"""From raw text to a model that writes, on this machine: what `make quickstart` runs.

Corpus (this machine's Python source, and with tiny-langs.yaml texts in three languages) -> shards -> tokenizer ->
pre-training, stopped by SIGTERM half-way and resumed -> held-out loss beside a bigram's, and by category -> samples ->
export to HuggingFace -> speed beside HuggingFace's Llama. What a step made is reused by the next run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.peers import hf as peer
from benchmarks.training import runner, work
from benchmarks.training.compare import compare
from openllama import cli, config, devices, hf
from openllama.data.bigram import bigram_loss
from openllama.data.cache import TokenCache
from openllama.data.documents import Document, Fields
from openllama.data.loader import Batch, PackedLoader
from openllama.data.packed import weight_of
from openllama.data.prepare import prepare
from openllama.data.sample import sample as sample_documents
from openllama.data.shards import read_manifest
from openllama.generate import sample
from openllama.load import load_model
from openllama.tokenizer import Tokenizer, compression
from openllama.tokenizer import train as train_tokenizer
from openllama.training import checkpoint
from openllama.training.config import TrainConfig, by_name
from openllama.training.monitor import plot_loss, read_metrics
from openllama.training.step import batch_loss, held_out_loss
from train import by_category
from train.language_texts import write_language_texts

ROOT = Path(__file__).resolve().parent.parent
PYTHON, LANGUAGES = "python", "languages"  # the sources it can make; one without a name is Python
PROMPTS = {
    PYTHON: ("def read_lines(path):\n", "class Stack:\n    def __init__(self", "import os\n"),
    LANGUAGES: ("无法打开", "ファイルを"),
}
LANGUAGES_HELD_OUT = 0.1  # of so small texts, for a dozen documents of each language
TIMED_STEPS = 12
BITS_PER_BYTE = 2.1  # held out, that the shipped configs of Python alone reach at least
CPU_SPEED = 1.1  # times HuggingFace's, that the shipped configs reach at least


class Quickstart:
    """The steps in order; each prints what it made and notes its figures for summary.json."""

    def __init__(self, settings: TrainConfig, config_path: Path, max_bytes: int):
        self.settings, self.config_path, self.max_bytes = settings, config_path, max_bytes
        self.shards, self.valid_shards = by_name(settings.shards), by_name(settings.valid_shards)
        self._check_sources()
        self.shipped = config_path.parent == ROOT / "train" / "configs"
        self.out = Path(settings.out)
        self.checkpoints = self.out / "checkpoints"
        self.remedy = f"remove {self.out} to start anew"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.failed: list[str] = []
        self.summary: dict[str, Any] = {"preset": settings.preset, "device": devices.name(self.device)}

    def _check_sources(self) -> None:
        if self.shards.keys() != self.valid_shards.keys():
            raise ValueError(
                f"{self.config_path}: shards are of {list(self.shards)}, valid_shards of {list(self.valid_shards)}; "
                "takes the same names in both"
            )
        if unknown := [name for name in self.shards if (name or PYTHON) not in PROMPTS]:
            raise ValueError(
                f"{self.config_path}: shards: got the name {unknown[0]!r}, the quickstart makes {', '.join(PROMPTS)}; "
                "train on other sources with train/pretrain.py"
            )

    def run(self) -> None:
        began = time.monotonic()
        stages = (
            self.corpus, self.tokenizer, self.pretrain, self.held_out, self.curve, self.samples, self.export, self.speed,
        )  # fmt: skip
        for number, stage in enumerate(stages, 1):
            print(f"\n[{number}/{len(stages)}] {stage.__doc__}", flush=True)
            stage()
        self.summary["seconds"] = time.monotonic() - began
        self.summary["failed"] = self.failed
        path = self.out / "summary.json"
        path.write_text(json.dumps(self.summary, indent=2) + "\n")
        print(f"\n{self.summary['seconds']:.0f} s in all; everything is in {self.out}, the figures in {path}")

        if self.failed:
            sys.exit(f"error: not as it should be: {'; '.join(self.failed)}")

    def _expect(self, holds: bool, otherwise: str) -> None:
        """Notes what should hold and doesn't: the rest still runs, and the command ends with an error that says so."""
        if not holds:
            self.failed.append(otherwise)

    def corpus(self) -> None:
        """Corpus: text on this machine, as shards"""
        documents = text_bytes = 0
        for name, train in self.shards.items():
            shards = Path(train).parent
            made = self._languages(shards) if name == LANGUAGES else prepare(PYTHON, shards, self.max_bytes)
            reused = "reusing" if made["reused"] else "wrote"
            print(f"{reused} {shards}: {made['documents']:,} documents, {made['text_bytes'] / 1e6:.1f} MB")
            documents, text_bytes = documents + made["documents"], text_bytes + made["text_bytes"]
        self.summary["corpus"] = {"documents": documents, "text_bytes": text_bytes}

    def _languages(self, shards: Path) -> dict[str, Any]:
        texts = self.out / "texts.jsonl"
        if not texts.exists():
            write_language_texts(texts)
        return prepare(texts, shards, valid_share=LANGUAGES_HELD_OUT, fields=Fields(category="language"))

    def tokenizer(self) -> None:
        """Tokenizer: SentencePiece BPE"""
        path, vocab = Path(self.settings.tokenizer), self.settings.model_config().vocab_size
        if path.exists():
            self.spm = Tokenizer(path)
            if self.spm.vocab_size != vocab:
                raise ValueError(
                    f"{path}: has {self.spm.vocab_size} pieces, {self.config_path} takes {vocab}; {self.remedy}"
                )
            print(f"reusing {path}: {self.spm.vocab_size:,} pieces")
        else:
            began = time.monotonic()
            self.spm = train_tokenizer((d["text"] for d in self._tokenizer_sample()), path, vocab)
            print(f"wrote {path}: {self.spm.vocab_size:,} pieces, {time.monotonic() - began:.1f} s")
        held_out = sample_documents(dict.fromkeys(self.valid_shards.values()), self.max_bytes)
        self.summary["bytes_per_token"] = compression(self.spm, held_out)
        for name, rate in self.summary["bytes_per_token"].items():
            print(f"  {rate:6.3f} bytes/token, held out: {name}")

    def _tokenizer_sample(self) -> Iterator[Document]:
        """In the proportions of training: so little that the category of the largest weight need not come twice."""
        weights = {
            category: float(weight_of(self.settings.mix, name, category))
            for name, folder in self.shards.items()
            for category in read_manifest(folder)["categories"]
        }
        max_bytes = int(self.max_bytes / max([1, *weights.values()]))
        return sample_documents(dict.fromkeys(self.shards.values()), max_bytes, weights)

    def pretrain(self) -> None:
        """Pre-training, stopped by SIGTERM half-way and resumed"""
        done = max(checkpoint.steps(self.checkpoints), default=0)
        if done:
            self._check_same_run(checkpoint.step_folder(self.checkpoints, done))
        if done >= self.settings.steps:
            print(f"reusing {self.checkpoints}: trained to step {done}")
        elif done:
            print(f"going on from step {done} of an earlier run")
            self._train()
        else:
            (self.out / "metrics.jsonl").unlink(missing_ok=True)  # of a run whose checkpoints are gone
            self._train(stop_at=self.settings.steps // 2)
            print("stopped by SIGTERM with exit code 143, as asked; now the same command again")
            self._train()
        records = read_metrics(self.out / "metrics.jsonl")
        speeds = sorted(r["tokens_per_second_per_gpu"] for r in records if "loss" in r)
        self.summary["training"] = {
            "reused": done >= self.settings.steps,
            "steps": self.settings.steps,
            "tokens": max(r.get("tokens", 0) for r in records),
            "final_loss": next(r["loss"] for r in reversed(records) if "loss" in r),
            "median_tokens_per_second": speeds[len(speeds) // 2],
        }

    def _check_same_run(self, place: Path) -> None:
        saved, now = checkpoint.read_state(place)["settings"], dataclasses.asdict(self.settings)
        if differs := [k for k in now if saved.get(k) != now[k]]:
            key = differs[0]
            raise ValueError(f"{place}: made with {key}={saved.get(key)!r}, now {now[key]!r}; {self.remedy}")

    def _train(self, stop_at: int = 0) -> None:
        """Runs pretrain.py; with `stop_at`, sends SIGTERM once that step is in the metrics and expects exit code 143."""
        command = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--config", str(self.config_path)]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            while stop_at and process.poll() is None:
                time.sleep(0.2)
                if any(r["step"] >= stop_at for r in read_metrics(self.out / "metrics.jsonl")):
                    process.send_signal(signal.SIGTERM)
                    break
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code != (128 + signal.SIGTERM if stop_at else 0):
            sys.exit(f"error: {' '.join(command)} ended with exit code {code}; its message is above")

    def held_out(self) -> None:
        """Held-out loss, beside a bigram model of the same corpus, and by category"""
        self.train_tokens, self.valid_tokens = self._tokens("train"), self._tokens("valid")
        dtype = getattr(torch, self.settings.dtype)
        self.model = load_model(self.checkpoints, dtype, self.device)[0]
        loader = self._valid_loader()
        with torch.no_grad():
            self.valid_loss = held_out_loss(self._loss, loader.one_epoch())
        text_bytes = sum(cache.text_bytes for cache in self.valid_tokens.values())
        self.per_byte = loader.targets_per_epoch / text_bytes / math.log(2)
        self.bigram = bigram_loss(self.train_tokens.values(), self.valid_tokens.values())
        ours, theirs = self.valid_loss * self.per_byte, self.bigram * self.per_byte
        print(f"ours   {self.valid_loss:.4f} nats/token, {ours:.3f} bits/byte")
        print(f"bigram {self.bigram:.4f} nats/token, {theirs:.3f} bits/byte (counts of all training tokens)")
        self._expect(
            ours < theirs, f"held out, {ours:.3f} bits/byte are not below the bigram model's {theirs:.3f}"
        )
        barred = self.shipped and LANGUAGES not in self.shards
        self._expect(
            not barred or ours <= BITS_PER_BYTE,
            f"held out, {ours:.3f} bits/byte, takes at most {BITS_PER_BYTE}",
        )
        self.summary["held_out"] = {
            "loss": self.valid_loss, "bits_per_byte": ours, "bigram_bits_per_byte": theirs, "text_bytes": text_bytes,
            "categories": self._by_category(),
        }  # fmt: skip

    def _by_category(self) -> dict[str, dict[str, Any]]:
        with torch.no_grad():
            self.figures = by_category.measure(
                self._loss, self.valid_tokens, self.settings.context, self.settings.batch
            )
        print(by_category.table(self.figures))
        return {category: dataclasses.asdict(f) for category, f in self.figures.items()}

    def _tokens(self, split: str) -> dict[str, TokenCache]:
        """Each source's tokens, where pre-training left them."""
        return {name: TokenCache(self.out / "tokens" / split / name) for name in self.shards}

    def _loss(self, batch: Batch) -> torch.Tensor:
        return batch_loss(self.model, batch, self.device)

    def _valid_loader(self) -> PackedLoader:
        return PackedLoader(self.valid_tokens, self.settings.context, self.settings.batch)

    def curve(self) -> None:
        """Pictures: the loss curve, and the categories"""
        loss, categories = self.out / "loss.png", self.out / "categories.png"
        plot_loss(self.out / "metrics.jsonl", loss, self.bigram * self.per_byte)
        by_category.plot(self.figures, categories)
        print(f"drew {loss} and {categories}")

    def samples(self) -> None:
        """Samples (temperature 0.8, top-k 50)"""
        starts = [prompt for name in self.shards for prompt in PROMPTS[name or PYTHON]]
        prompts = [[self.spm.bos_id, *self.spm.encode(p)] for p in starts]
        eos = self.spm.eos_id
        texts = sample(self.model, prompts, 120, 0.8, 50, seed=1, eos_id=eos, vocab_size=self.spm.vocab_size)
        self.summary["samples"] = [p + self.spm.decode(ids) for p, ids in zip(starts, texts)]
        for text in self.summary["samples"]:
            print("-" * 80 + f"\n{text}")
        print("-" * 80)

    def export(self) -> None:
        """Export to HuggingFace, and its held-out loss there"""
        folder = self.out / "hf"
        hf.export_hf(self.model, folder, self.settings.tokenizer)
        exported = peer.from_folder(folder, self.device, self.model.embed.weight.dtype)
        there = peer.HuggingFace(exported, self.settings.batch, packed=True)
        with torch.no_grad():
            theirs = held_out_loss(there.loss, self._valid_loader().one_epoch())
        gap = abs(theirs - self.valid_loss) / self.valid_loss
        print(f"{folder}: {theirs:.6f} nats/token in transformers, {self.valid_loss:.6f} here")
        tolerance = 1e-4 if self.model.embed.weight.dtype == torch.float32 else 1e-2
        self._expect(
            gap <= tolerance,
            f"the export's loss differs by {gap:.1e} of itself, takes at most {tolerance:.0e}",
        )
        self.summary["export"] = {"held_out_loss": theirs, "relative_gap": gap}

    def speed(self) -> None:
        """Training speed beside HuggingFace's Llama: same weights, same batches, same run"""
        c = self.settings
        loader = PackedLoader(self.train_tokens, c.context, c.batch, seed=1, mix=c.mix)
        count = TIMED_STEPS + work.WARMUP
        steps = [[next(loader) for _ in range(c.accumulation)] for _ in range(count)]
        rows = compare(self.model, steps, c.batch, self.device)
        for row in rows:
            row["shape"] = {"preset": c.preset, "batch": c.batch, "seq": c.context}
        print(runner.table(rows))
        results.write("speed", rows, self.device, self.out)
        ratio = rows[1]["ratio"]
        barred = self.shipped and self.device.type == "cpu"
        self._expect(
            not barred or ratio >= CPU_SPEED,
            f"training is {ratio:.2f} times as fast as HuggingFace's, takes at least {CPU_SPEED}",
        )
        self.summary["speed"] = {
            "ours_tokens_per_second": rows[0]["rate"],
            "hf_tokens_per_second": rows[1]["rate"],
            "ratio": ratio,
            "loss_gap": rows[1]["loss_gap"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "125m" if torch.cuda.is_available() else "tiny"
    path = ROOT / "train" / "configs" / f"{here}.yaml"
    parser.add_argument(
        "--config",
        type=Path,
        default=path,
        help="settings of the run (125m with a GPU, else tiny; tiny-langs: Python and three languages)",
    )
    parser.add_argument("--max-bytes", type=int, default=20_000_000, help="of text in the corpus")
    args = parser.parse_args()
    path = args.config.resolve()
    os.chdir(ROOT)  # what a config names is relative to it, as in `make quickstart`
    Quickstart(config.load(TrainConfig, path), path, args.max_bytes).run()


if __name__ == "__main__":
    cli.run(main)
