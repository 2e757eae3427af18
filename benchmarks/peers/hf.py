"""HuggingFace's Llama as a user sets it up: sdpa attention, PyTorch's fused AdamW, documents kept apart by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from openllama.data.loader import Batch


class HuggingFace:
    """A peer: `step(batches)` is one optimizer step over the same packed batches as ours."""

    name = "hf:sdpa"
    optimizer_form = "torch fused AdamW, states in the weights' dtype"

    def __init__(
        self,
        folder: Path,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
        lr: float = 1e-4,
        clip: float = 1.0,
    ):
        """The model in `folder`; a micro-batch reaches it as (rows, tokens / rows), the shape it is fastest in."""
        from transformers import LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.rows, self.device, self.clip = rows, device, clip
        self.model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model.to(device)
        decay = [p for p in self.model.parameters() if p.dim() >= 2]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Summed cross-entropy. transformers reads document borders off the restarting positions and masks them."""
        ids, positions, labels = (
            t.to(self.device).view(self.rows, -1) for t in (batch.ids, batch.positions, batch.labels)
        )
        logits = self.model(input_ids=ids, position_ids=positions.long(), use_cache=False).logits
        return F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )

    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        targets = sum(b.targets for b in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.loss(batch) / targets
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total
