"""What every side is asked to do: a model's shape, and optimizer steps over random tokens."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from openllama.config import ModelConfig
from openllama.presets import PRESETS, preset

LR, CLIP, WEIGHT_DECAY, BETAS = 1e-4, 1.0, 0.1, (0.9, 0.95)
WARMUP = 2  # steps that don't count: allocations, compilation, algorithm choices
GRAPH_WARMUP = 4  # where a step has few micro-batches: a graph is captured at the fourth of a shape
SEED = 0


@dataclass(frozen=True)
class Work:
    """An optimizer step is `accumulation` micro-batches of `batch` documents, each `seq` tokens long."""

    preset: str
    batch: int
    seq: int
    accumulation: int = 1
    steps: int = 10  # that are timed
    layers: int | None = None  # None: the preset's
    parts: bool = False  # one more step, under the profiler
    fit_layers: bool = False  # as many of the layers as the card holds

    def __post_init__(self) -> None:
        whole = preset(self.preset)
        for name in ("batch", "seq", "accumulation", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: got {getattr(self, name)}, takes a whole number of at least 1")
        if self.seq > whole.max_positions:
            raise ValueError(
                f"--seq: got {self.seq}, takes at most {whole.max_positions}, the max_positions of {self.preset}"
            )
        if self.layers is not None and not 1 <= self.layers <= whole.layers:
            raise ValueError(
                f"--layers: got {self.layers}, takes 1 to {whole.layers}, what {self.preset} has"
            )

    @property
    def config(self) -> ModelConfig:
        whole = preset(self.preset)
        return dataclasses.replace(whole, layers=self.layers or whole.layers)

    @property
    def tokens(self) -> int:
        """Of an optimizer step."""
        return self.batch * self.seq * self.accumulation

    @property
    def warmup(self) -> int:
        """Steps before those that are timed."""
        return WARMUP if self.accumulation > 2 else GRAPH_WARMUP

    @property
    def shape(self) -> dict[str, Any]:
        """As it stands in a row: `layers` only where they are cut."""
        shape: dict[str, Any] = {
            "preset": self.preset,
            "batch": self.batch,
            "seq": self.seq,
            "accumulation": self.accumulation,
        }
        cut = self.config.layers != preset(self.preset).layers
        return shape | ({"layers": self.config.layers} if cut else {})

    @property
    def suffix(self) -> str:
        """Of the stored run's name."""
        layers = f"-l{self.shape['layers']}" if "layers" in self.shape else ""
        return f"{self.preset}-b{self.batch}-s{self.seq}{layers}"


def add_arguments(parser: argparse.ArgumentParser, default_preset: str) -> None:
    parser.add_argument("--preset", default=default_preset, choices=list(PRESETS))
    parser.add_argument("--layers", type=int, help="only so many of the preset's")
    add_step_arguments(parser)


def add_step_arguments(parser: argparse.ArgumentParser, batch: int = 8) -> None:
    parser.add_argument(
        "--batch", type=int, default=batch, help="documents in a micro-batch; lower it when memory runs out"
    )
    parser.add_argument("--seq", type=int, default=1024, help="tokens in a document")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in an optimizer step")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps that are timed")
    parser.add_argument("--parts", action="store_true", help="also the time of each part, on a GPU")


def from_arguments(args: argparse.Namespace, **changes: Any) -> Work:
    """The work that the parsed arguments name. Raises ValueError naming the one that is wrong."""
    names = {field.name for field in dataclasses.fields(Work)}
    return Work(**{k: v for k, v in vars(args).items() if k in names} | changes)
