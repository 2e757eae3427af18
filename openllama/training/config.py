"""All settings of a pre-training run."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from openllama.block import Recompute
from openllama.config import ModelConfig, from_dict
from openllama.presets import preset


@dataclass
class TrainConfig:
    """A pre-training run. Batches, steps and tokens are per optimizer step and process where nothing else is said."""

    preset: str  # a shape of openllama/presets.py
    shards: (
        str | dict[str, str]
    )  # folder of part-*.jsonl.zst with their manifest, to train on; several as name: folder
    tokenizer: str  # SentencePiece model
    out: str  # folder of the run: checkpoints/, tokens/, metrics.jsonl
    steps: int  # optimizer steps of the whole run

    valid_shards: str | dict[str, str] | None = None  # held-out shards
    start_from: str | None = (
        None  # model folder whose weights a new run takes: imported, merged, or of another run
    )
    model: dict[str, Any] = field(default_factory=dict)  # fields of the preset to change
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of weights and activations

    context: int = 1024  # tokens in a pack
    long: Literal["split", "sample", "truncate"] = "split"  # what becomes of longer documents (data/pack.py)
    mix: dict[str, float] = field(
        default_factory=dict
    )  # how often an epoch takes a source or category (data/loader.py)
    processes: int | None = None  # that tokenise, before the first step; default: one per core
    batch: int = 2  # packs in a micro-batch; lower it when memory runs out, and raise accumulation
    accumulation: int = 12  # micro-batches in an optimizer step

    lr: float = 2e-4  # peak
    min_lr_share: float = 0.1  # the cosine ends at this share of the peak
    warmup: int = 2000  # steps of linear warm-up
    weight_decay: float = 0.1  # of matrices; norms and biases don't decay
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # largest global gradient norm
    # Of AdamW (openllama/optim.py); lower them when memory runs out. Moments of 16 and 8 bits are rounded stochastically.
    moments: Literal["fp32", "bf16", "8bit"] = "fp32"
    # Of bfloat16 weights: fp32 (4 bytes a parameter); remainder (2), as exact; none (0), weights rounded stochastically.
    masters: Literal["fp32", "remainder", "none"] = "fp32"

    # What backward makes again instead of keeping it (openllama/block.py): none, norm, mlp, full; lower memory to the right.
    # null: the first that fits.
    recompute: Recompute | None = None
    # Micro-batches as CUDA graphs; null: where it takes longer to launch their kernels than to run them. On one GPU.
    cuda_graph: bool | None = None

    seed: int = 42
    log_every: int = 1  # steps
    valid_every: int = 500
    valid_batches: int = 0  # batches of a validation; 0: all of the held-out set
    save_every: int = 1000
    keep: int = 2  # checkpoints that stay
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb, trackio: through Accelerate

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "context",
            "batch",
            "accumulation",
            "log_every",
            "valid_every",
            "save_every",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes a whole number of at least 1")
        if self.processes is not None and self.processes < 1:
            raise ValueError(
                f"processes: got {self.processes}, takes a whole number of at least 1, or null to choose"
            )
        for name in ("lr", "eps", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes a finite number above 0")
        for name in ("warmup", "weight_decay", "valid_batches"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes a number of at least 0")
        for name in ("beta1", "beta2", "min_lr_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, takes a number from 0 up to, but not, 1"
                )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, takes a whole number from 0 to below 2^32")
        for shards in (self.shards, self.valid_shards):
            for name in by_name(shards):
                if name and not re.fullmatch(r"\w[\w.-]*", name):
                    raise ValueError(
                        f"shards: got the name {name!r}, takes letters, digits, '.', '-' and '_'"
                    )
        self.model_config()

    def model_config(self) -> ModelConfig:
        """The preset with `model`'s fields changed; sizes that follow from others follow the changed ones."""
        base = dataclasses.asdict(preset(self.preset))
        if base["head_dim"] * base["heads"] == base["hidden"]:
            base["head_dim"] = 0
        if base["kv_heads"] == base["heads"]:
            base["kv_heads"] = 0
        shape = from_dict(ModelConfig, {**base, **self.model}, "model")
        if self.context > shape.max_positions:
            raise ValueError(
                f"context: got {self.context}, takes at most the model's max_positions={shape.max_positions}"
            )
        return shape

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 1): linear warm-up, then a cosine to min_lr_share of the peak."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        floor = self.min_lr_share
        return self.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def by_name(shards: str | dict[str, str] | None) -> dict[str, str]:
    """The folders of several sources by name; one alone has none."""
    return shards if isinstance(shards, dict) else {"": shards} if shards else {}
