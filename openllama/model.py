"""A compact Llama on our ops: pre-norm blocks, fused QKV and gate-up projections, rotary, SwiGLU, GQA.

Touvron et al., "LLaMA", 2023; the stable embedding (a LayerNorm right after the embedding) and the tied head are
options, as in Open-Llama. The model works on a flat row of tokens, so that packed documents need no padding; a dense
(batch, seq) input is flattened on the way in.
"""

from __future__ import annotations

import torch
from torch import nn

from openllama import block
from openllama.config import ModelConfig
from openllama.ops import embedding, linear_cross_entropy, rms_norm, rotary_tables


class Embedding(nn.Embedding):
    """The table; looking up and its gradient are `ops.embedding`."""

    def forward(self, ids: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
        return embedding(ids, self.weight, accumulate=accumulate)


class RMSNorm(nn.Module):
    """The weight of one norm; the arithmetic is `ops.rms_norm`."""

    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        return rms_norm(x, self.weight, self.eps, residual)


class Attention(nn.Module):
    """The projections of the attention half."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.wqkv = nn.Linear(c.hidden, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=False)
        self.wo = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)


class MLP(nn.Module):
    """The projections of the MLP half."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w_gate_up = nn.Linear(config.hidden, 2 * config.intermediate, bias=False)
        self.w_down = nn.Linear(config.intermediate, config.hidden, bias=False)


class Layer(nn.Module):
    """The weights of one block; what it does with them is openllama/block.py."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = block.Heads(config.heads, config.kv_heads, config.head_dim)
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        branch: torch.Tensor,
        residual: torch.Tensor | None,
        sequences: block.Sequences,
        settings: block.Settings,
        cache: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream comes and goes as its last branch, not yet added, and the rest."""
        norm, a, m = self.attention_norm, self.attention, self.mlp
        middle = block.Attention(self.heads, sequences, cache)
        branch, residual = block.half(
            middle, branch, residual, norm.weight, [a.wqkv.weight], a.wo.weight, norm.eps, settings
        )
        norm = self.mlp_norm
        return block.half(
            block.Swiglu(),
            branch,
            residual,
            norm.weight,
            [m.w_gate_up.weight],
            m.w_down.weight,
            norm.eps,
            settings,
        )


class Llama(nn.Module):
    """The model. `forward` gives logits, or with labels the summed cross-entropy that training uses.

    `settings` says what a block keeps for backward, and whether weight gradients are added to `.grad` in their matrix
    products (openllama/block.py); assign another one at any time between steps.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.settings = config, block.Settings()
        self.embed = Embedding(config.vocab_size, config.hidden)
        self.embed_norm = nn.LayerNorm(config.hidden, config.norm_eps) if config.stable_embedding else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def initialise(self, seed: int = 0) -> Llama:
        """Matrices from normal(0, init_std), norms to 1, biases to 0. The same weights on every device and dtype."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                values = torch.empty(parameter.shape).normal_(0, self.config.init_std, generator=generator)
                parameter.copy_(values)
        for module in self.modules():
            if isinstance(module, (RMSNorm, nn.LayerNorm)):
                nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        return self

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary cos and sin on `device`, fp32 whatever the model's dtype is (so no buffers: `.to(bf16)` casts those)."""
        if self._tables is None or self._tables[0].device != device:
            c = self.config
            with torch.inference_mode(False):  # tensors made in it could never be saved for a backward
                self._tables = rotary_tables(
                    c.head_dim, c.max_positions, c.rope_theta, c.rope_scaling, device
                )
        return self._tables

    def hidden_states(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        cache: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The final norm's output, (tokens, hidden). Arguments as in `forward`, and, without gradients:

        cache: from `new_cache`, written in place at each token's position. With cu_seqlens, document i is read from its
            start into row i (an empty one leaves its row as it is). Without, ids and positions are (rows,): the next
            token of each row, which sees what the row holds before it. A slice of rows or capacity will do.
        """
        sequences = self._sequences(ids, positions, cu_seqlens, max_seqlen, cache)
        x = self.embed(ids.reshape(-1), self.settings.accumulate)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        residual = None
        for layer, entries in zip(self.layers, [None] * len(self.layers) if cache is None else cache):
            x, residual = layer(x, residual, sequences, self.settings, entries)
        return self.norm(x, residual)[0]

    def new_cache(self, rows: int, capacity: int) -> torch.Tensor:
        """An empty key-value cache, (layers, 2, rows, capacity, kv_heads, head_dim), for `hidden_states`.

        In the dtype and on the device of the weights. Raises ValueError for a capacity over max_positions.
        """
        c = self.config
        if capacity > c.max_positions:
            raise ValueError(f"capacity: got {capacity}, takes at most max_positions={c.max_positions}")
        # not empty(): attention multiplies what it masks by 0, and leftover memory may hold NaN
        return self.embed.weight.new_zeros(c.layers, 2, rows, capacity, c.kv_heads, c.head_dim)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        labels: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits, or the loss when labels are given.

        Args:
            ids: (batch, seq), each row a document; or (tokens,) with cu_seqlens, packed documents.
            positions: (tokens,) int32, each token's place in its document; None: counted from each row's start
                (needed with cu_seqlens).
            cu_seqlens: (documents + 1) int32 borders of packed documents.
            max_seqlen: the longest document's length, with cu_seqlens.
            labels: ids' shape: the next token of each, -100 where none counts.
            scale: of the loss, one fp32 number on the device; None: 1. Here and not on the loss, because the head's
                gradient is made in forward; with `settings.accumulate` there is no other place for it.

        Returns:
            Logits of ids' shape + (vocab,); with labels the summed cross-entropy in nats, fp32, times `scale`: one over the
            number of labels that count makes a mean of it.

        Raises:
            ValueError: an id beyond the vocabulary (on the CPU), an input longer than max_positions.
        """
        hidden = self.hidden_states(ids, positions, cu_seqlens, max_seqlen)
        if labels is None:
            return self.head(hidden).view(*ids.shape, self.config.vocab_size)
        labels, accumulate = labels.reshape(-1), self.settings.accumulate
        weights = None if scale is None else scale.expand(len(labels)).contiguous()
        return linear_cross_entropy(
            hidden, self.head.weight, labels, weights=weights, reduction="sum", accumulate=accumulate
        )

    def _sequences(self, ids, positions, cu_seqlens, max_seqlen, cache) -> block.Sequences:
        dense_shape = rows = None
        if cache is not None:
            rows = _cache_rows(cache, ids, cu_seqlens)
            max_seqlen = cache.shape[3] if cu_seqlens is None else max_seqlen
        elif cu_seqlens is None:
            if ids.dim() != 2:
                raise ValueError(
                    f"ids: got shape {tuple(ids.shape)}, takes (batch, seq), or (tokens,) with cu_seqlens"
                )
            batch, seq = dense_shape = tuple(ids.shape)
            max_seqlen = seq
            if positions is None:
                positions = torch.arange(seq, dtype=torch.int32, device=ids.device).repeat(batch)
        if positions is None or max_seqlen is None:
            raise ValueError(
                "positions and max_seqlen: got None, takes both with cu_seqlens, positions with a cache"
            )
        if max_seqlen > self.config.max_positions:
            raise ValueError(
                f"ids: a document of {max_seqlen} tokens, takes at most max_positions={self.config.max_positions}"
            )
        cos, sin = self.tables(ids.device)
        return block.Sequences(positions.reshape(-1), cos, sin, cu_seqlens, max_seqlen, dense_shape, rows)


def _cache_rows(cache, ids, cu_seqlens) -> torch.Tensor:
    """(tokens,), the row of the cache that each token belongs to."""
    count = ids.numel() if cu_seqlens is None else len(cu_seqlens) - 1
    if count != cache.shape[2]:
        raise ValueError(
            f"cache: got {cache.shape[2]} rows, takes {count}, one for each document or next token"
        )
    if cu_seqlens is None:
        return torch.arange(count, device=ids.device)
    return torch.repeat_interleave(cu_seqlens.diff(), output_size=len(ids))


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model, each counted once (a tied head is the embedding)."""
    c = config
    attention = (2 * c.heads + 2 * c.kv_heads) * c.head_dim * c.hidden  # wqkv and wo
    layer = attention + 3 * c.intermediate * c.hidden + 2 * c.hidden  # and the MLP, two norms
    tables = (1 if c.tied else 2) * c.vocab_size * c.hidden
    return tables + c.layers * layer + c.hidden + (2 * c.hidden if c.stable_embedding else 0)


def flops_per_token(config: ModelConfig, seq: float) -> float:
    """Model FLOPs of one trained token: 6 for each parameter that multiplies, and causal attention over `seq` tokens.

    Attention's two products cost 2 * 2 * heads * head_dim * seq / 2 forward (a token sees half of them on average) and
    twice that backward. For packed documents `seq` is sum(len^2) / sum(len).
    """
    multiplying = parameter_count(config) - config.vocab_size * config.hidden * (not config.tied)
    return 6.0 * multiplying + 6.0 * config.layers * config.heads * config.head_dim * seq
