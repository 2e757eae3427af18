"""HuggingFace's Llama as users set it up: attention, optimizer, torch.compile, Liger, fp8, or our own ops patched in.

Everybody's step is the same: ids as (batch, seq) rows, the loss the mean over the whole step's labels, .backward() for each
micro-batch, clipping, torch's AdamW with states in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.training import weights
from benchmarks.training.work import BETAS, CLIP, LR, WEIGHT_DECAY
from openllama.config import ModelConfig
from openllama.data.loader import Batch
from openllama.hf_config import config_to_hf

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class NotInstalled(Exception):
    """What a peer needs is not here; the message says what."""


class HuggingFace:
    """A peer: `step(batches)` is one optimizer step over the same batches as ours.

    Args:
        rows: a micro-batch reaches the model as (rows, tokens / rows), the shape it is fastest in.
        optimizer: torch.optim.AdamW's implementation.
        compiled: nothing, each decoder layer in place, or the model together with its loss.
        padding_mask: pass an attention_mask of ones, as the original's training did.
        packed: pass the positions, off whose restarts transformers reads documents' borders.
    """

    settings_words = ""

    def __init__(
        self,
        model: Any,
        rows: int,
        optimizer: Literal["fused", "foreach"] = "fused",
        compiled: Literal["", "layers", "model"] = "",
        padding_mask: bool = False,
        packed: bool = False,
    ):
        if compiled not in ("", "layers", "model"):
            raise ValueError(f"compiled: got {compiled!r}, takes '', 'layers' or 'model'")
        self.model, self.rows, self.packed, self.padding_mask = model.train(), rows, packed, padding_mask
        self.device = next(model.parameters()).device
        decay = [p for p in model.parameters() if p.dim() >= 2]
        rest = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, **{optimizer: True})
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.optimizer_words = f"torch {optimizer} AdamW, states in {dtype}"
        if compiled == "layers":
            for layer in model.model.layers:
                layer.compile()
        # with the loss, so that logits need not be an output
        self._call = torch.compile(self._forward) if compiled == "model" else self._forward

    def _forward(
        self, ids: torch.Tensor, labels: torch.Tensor, extra: dict[str, Any], over: torch.Tensor | int
    ) -> torch.Tensor:
        # shift_labels: they are the next tokens already
        given = {"labels": labels, "shift_labels": labels, "num_items_in_batch": over}
        return self.model(input_ids=ids, use_cache=False, **given, **extra).loss

    def loss(self, batch: Batch, over: torch.Tensor | int = 1) -> torch.Tensor:
        """Summed cross-entropy, divided by `over`."""

        def put(t: torch.Tensor) -> torch.Tensor:
            return t.to(self.device, non_blocking=True).view(self.rows, -1)

        ids, labels = put(batch.ids), put(batch.labels)
        extra = {"position_ids": put(batch.positions).long()} if self.packed else {}
        if self.padding_mask:
            extra["attention_mask"] = torch.ones_like(ids)
        return self._call(ids, labels, extra, over)

    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        targets = torch.full(
            (), sum(b.targets for b in batches), device=self.device
        )  # as the Trainer hands it on
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.loss(batch, targets)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def from_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """An exported model, with sdpa."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(device)


def from_config(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    kernels: Literal["", "liger", "ours"] = "",
    fp8: bool = False,
    block: bool | None = None,
) -> Any:
    """A model of this shape with the seeded weights, made on the device.

    It has no stable embedding, which HuggingFace's Llama doesn't know: 2 x hidden parameters fewer, one LayerNorm less
    to do. The head is tied where ours is. `kernels`: Liger's or ours in place of its own; `block` is an argument of
    our patch. `fp8`: the decoder layers' linears by torchao, with its default recipe.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if kernels not in ("", "liger", "ours"):
        raise ValueError(f"kernels: got {kernels!r}, takes '', 'liger' or 'ours'")
    patch = _our_patch() if kernels == "ours" else None  # first what may be missing, then the weights
    if fp8:
        from torchao.float8 import convert_to_float8_training
    if kernels == "liger":  # replaces classes: before the model is made, as its README does
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    shape = config_to_hf(weights.without_stable_embedding(config), dtype)
    theirs = LlamaConfig.from_dict(shape | NO_TOKENS | {"use_cache": False})
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            theirs, dtype=dtype, attn_implementation=_attention(attention)
        )
    weights.fill_theirs(model, config, device)
    if patch is not None:
        patch(model, **({} if block is None else {"block": block}))
    if fp8:
        convert_to_float8_training(model, module_filter_fn=lambda module, name: ".layers." in f".{name}")
    return model


def _attention(name: str) -> str:
    """transformers' name for it."""
    if name == "flash":
        from transformers import utils

        for version in (3, 2):  # the newer, where both are there
            if getattr(utils, f"is_flash_attn_{version}_available")():
                return f"flash_attention_{version}"
        raise NotInstalled("flash-attn")
    if name == "xformers":
        from transformers import AttentionInterface

        AttentionInterface.register("xformers", _xformers())
    return name


def _xformers() -> Any:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        """(batch, heads, seq, head_dim) in, (batch, seq, heads, head_dim) out, and no weights."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask(), scale=scaling), None

    return attend


def _our_patch() -> Any:
    try:
        from openllama.hf import patch
    except ImportError as missing:
        raise NotInstalled("openllama.hf.patch") from missing
    return patch


def build(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    attention: str = "sdpa",
    kernels: Literal["", "liger", "ours"] = "",
    fp8: bool = False,
    block: bool | None = None,
    **settings: Any,
) -> HuggingFace:
    """The peer, of from_config's settings and HuggingFace's."""
    return HuggingFace(from_config(config, device, dtype, attention, kernels, fp8, block), rows, **settings)
