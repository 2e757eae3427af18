"""Our side: the very step that pre-training runs, and how its settings are named in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.training import memory, weights
from benchmarks.training.work import CLIP, LR, WEIGHT_DECAY, Work
from openllama.config import ModelConfig
from openllama.data.loader import Batch
from openllama.model import Llama
from openllama.optim import AdamW, decay_groups
from openllama.training.memory import choose_recompute, usable_bytes
from openllama.training.micro_step import GraphedMicroStep, choose_micro_step
from openllama.training.step import accumulate_gradients, train_step


class Ours:
    """The model is set up as the trainer does it, for micro-batches of `tokens` tokens in sequences of `seq`. It differs from
    that where `accumulate` is not None, or `recompute` or `graph` are asked for: the one place that knows where each goes."""

    def __init__(
        self,
        model: Llama,
        tokens: int,
        seq: int,
        form: memory.Form = memory.FORMS[0],
        recompute: str | None = None,
        accumulate: bool | None = None,
        graph: bool | None = None,
    ):
        self.model, self.form = model, form
        self.optimizer = AdamW(
            decay_groups(model, WEIGHT_DECAY), lr=LR, moments=form.moments, masters=form.masters
        )
        accumulate_gradients(model)
        recompute = recompute or choose_recompute(model, self.optimizer, tokens)
        model.settings = model.settings._replace(recompute=recompute)
        if accumulate is not None:
            model.settings = model.settings._replace(accumulate=accumulate)
        self.micro_step = choose_micro_step(model, tokens, seq, graph, world=1)

    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        targets = sum(batch.targets for batch in batches)
        return train_step(
            self.model, self.optimizer, batches, targets, LR, CLIP, micro_step=self.micro_step
        ).loss

    @property
    def optimizer_words(self) -> str:
        masters = {
            "fp32": "fp32 masters",
            "remainder": "exact masters as 16-bit remainders",
            "none": "no masters",
        }
        of_weights = "fp32 weights"
        if next(self.model.parameters()).dtype != torch.float32:
            of_weights = masters[self.form.masters]
        return f"our AdamW, {self.form.moments} moments, {of_weights}, {self.optimizer.state_bytes():.1f} bytes a parameter"

    @property
    def settings_words(self) -> str:
        words = (
            self.model.settings._asdict()
            | {"graph": isinstance(self.micro_step, GraphedMicroStep)}
            | self.form._asdict()
        )
        return ", ".join(f"{name} {value}" for name, value in words.items())


def forms(
    work: Work,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    moments: str,
    masters: str,
    recompute: str | None,
) -> tuple[memory.Form, ...]:
    """The forms of AdamW to try in turn, until one does not run out of memory: those that `moments` and `masters` allow."""
    allowed = tuple(
        f for f in memory.FORMS if moments in ("auto", f.moments) and masters in ("auto", f.masters)
    )
    if not allowed and "auto" not in (moments, masters):
        allowed = (memory.Form(moments, masters),)  # AdamW itself says what it takes
    if not allowed:
        raise ValueError(
            f"--moments, --masters: got {moments}, {masters}; auto takes one of "
            + "; ".join(", ".join(form) for form in memory.FORMS)
        )
    tokens, kept = work.batch * work.seq, recompute or memory.RECOMPUTE
    return memory.fitting(
        allowed, usable_bytes(device), lambda form: memory.need(config, tokens, dtype, form, kept)
    )


def build(
    work: Work,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    form: memory.Form,
    **switches: Any,
) -> Ours:
    model = weights.our_model(config, device, dtype)
    return Ours(model, work.batch * work.seq, work.seq, form, **switches)
