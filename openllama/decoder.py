"""Logits token by token: what a prompt's tokens left in the model is kept in a key-value cache, not computed again.

A cache takes 2 * layers * kv_heads * head_dim elements a token: 32 KiB for the 1b in bf16, 512 KiB for the 7b.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from openllama.model import Llama

# The part of the cache that a step reads grows by so many tokens at once: cuDNN's attention makes a plan for each new
# shape, which cost 80 ms a step on an H100 where every step had one of its own.
STEP = 128


class Decoder:
    """Contexts that grow by one token a step, a row of the cache each.

    A row that outgrows the model's max_positions loses the oldest quarter of them at once, and what stays is read anew
    from position 0: that costs one pass over it every max_positions / 4 tokens, not one a token. From there on, a token
    is drawn with the last 3/4 to 4/4 of max_positions in view.

    Args:
        model: on any device and in any dtype; call under torch.no_grad().
        prompts: ids of each, at least one. Of one longer than max_positions the last max_positions are read.
        max_new_tokens: how far a row may grow; with max_positions, it sets the memory:
            (layers, 2, prompts, capacity, kv_heads, head_dim) in the model's dtype, with capacity the smaller of
            max_positions and the longest prompt + max_new_tokens.
    """

    def __init__(self, model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int):
        self.model, self.limit = model, model.config.max_positions
        self.windows = [list(p[-self.limit :]) for p in prompts]  # what the model sees of each row
        self.cached = [False] * len(prompts)  # whether the cache holds a row's window, but for its last token
        longest = max(map(len, self.windows))
        self.cache = model.new_cache(len(prompts), min(self.limit, longest + max_new_tokens))

    def logits(self) -> torch.Tensor:
        """After the last token of each row, (rows, vocab). Then every row has to grow by `append`, or go by `keep`."""
        self._prefill()
        lengths = [len(w) for w in self.windows]
        ids = self._tensor([w[-1] for w in self.windows])
        positions = self._tensor([n - 1 for n in lengths], torch.int32)
        seen = -(-max(lengths) // STEP) * STEP  # beyond the cache's end a slice takes what there is
        cache = self.cache[:, :, : len(lengths), :seen]
        return self.model.head(self.model.hidden_states(ids, positions, cache=cache))

    def append(self, row: int, token: int) -> None:
        """Lets a row grow by its next token."""
        window = self.windows[row]
        window.append(token)
        if len(window) > self.limit:
            del window[: len(window) - (self.limit - self.limit // 4)]
            self.cached[row] = False

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these, in rising order; they move up, and are 0, 1, ... from now on."""
        for to, row in enumerate(rows):
            if to != row and self.cached[row]:
                length = len(self.windows[row])
                self.cache[:, :, to, :length] = self.cache[:, :, row, :length]
        self.windows = [self.windows[r] for r in rows]
        self.cached = [self.cached[r] for r in rows]

    def _prefill(self) -> None:
        """Reads the windows that are not in the cache in one packed pass, in which other rows are empty documents."""
        unread = [[] if cached else w[:-1] for w, cached in zip(self.windows, self.cached)]
        self.cached = [True] * len(unread)
        lengths = [len(u) for u in unread]
        if not any(lengths):
            return
        ids = self._tensor([i for u in unread for i in u])
        positions = self._tensor([p for n in lengths for p in range(n)], torch.int32)
        cu_seqlens = F.pad(self._tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0))
        cache = self.cache[:, :, : len(lengths)]
        self.model.hidden_states(ids, positions, cu_seqlens, max(lengths), cache)

    def _tensor(self, values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.cache.device)
