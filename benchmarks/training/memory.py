"""What a step of ours holds, estimated before anything is allocated: which form of AdamW fits, or how many layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.training.work import Work
from openllama.block import Recompute
from openllama.config import ModelConfig
from openllama.model import parameter_count
from openllama.optim import AdamW, Masters, Moments
from openllama.training.memory import activation_bytes, step_bytes

RECOMPUTE: Recompute = "norm"  # with which a form has to fit: rather that than a leaner form


class Form(NamedTuple):
    """Of AdamW."""

    moments: Moments
    masters: Masters


# The fastest to the leanest. All keep masters exact.
FORMS = (
    Form("fp32", "fp32"),
    Form("fp32", "remainder"),
    Form("bf16", "remainder"),
    Form("8bit", "remainder"),
)


def need(
    config: ModelConfig, tokens: int, dtype: torch.dtype, form: Form, recompute: Recompute = RECOMPUTE
) -> float:
    """Bytes of a step with micro-batches of `tokens`."""
    weight = torch.nn.Parameter(torch.empty(2**20, dtype=dtype, device="meta"))
    each = AdamW([weight], moments=form.moments, masters=form.masters).state_bytes()
    return step_bytes(parameter_count(config), each, activation_bytes(config, tokens, dtype, recompute))


def fitting(forms: tuple[Form, ...], usable: float, needs: Callable[[Form], float]) -> tuple[Form, ...]:
    """The first form that fits into `usable` bytes and those after it, for when the estimate was too low; the last at least."""
    first = next((i for i, form in enumerate(forms) if needs(form) <= usable), len(forms) - 1)
    return forms[first:]


def largest_cut(config: ModelConfig, work: Work, dtype: torch.dtype, usable: float) -> ModelConfig:
    """The model with as many of its layers, at least one, as fit into `usable` bytes in the leanest form."""

    def fits(layers: int) -> bool:
        cut = dataclasses.replace(config, layers=layers)
        return need(cut, work.batch * work.seq, dtype, FORMS[-1]) <= usable

    layers = next((n for n in range(config.layers, 0, -1) if fits(n)), 1)
    return dataclasses.replace(config, layers=layers)
