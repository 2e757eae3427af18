"""A Llama block as two halves, each of them one autograd node, written by hand over our ops and matrix products.

    h = branch + residual
    branch' = W_out middle(W_in norm(h))        middle: rotary and attention, or SwiGLU

A half gives (branch', h): the add rides in the next norm. (In the matrix product it would cost more: PyTorch's addmm copies
what it adds to.) By hand, because autograd would keep more than backward needs, add up gradients in passes of their own
and wait between ops; here nothing is kept that is cheaper to make again, and weight gradients are added up in their product.

What a half keeps for backward, and what it makes again (bytes: of the 7b in bf16, a token and layer):

    recompute | both keep h and rstd | attention                        | MLP                           | KB
    none      | norm(h)              | qkv after rotary, out and lse    | gate-up, act                   | 132
    norm      |                      | the same; norm(h) made again     | gate-up; both made again       |  93
    mlp       |                      | the same                         | nothing: one product more      |  49
    full      |                      | nothing: product and attention   | nothing                        |  16
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from openllama.kernels import backend, checks
from openllama.kernels.attention_qkv import Kept
from openllama.kernels.matmul import give_gradient, linear_weight_gradient, linears, matmul
from openllama.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from openllama.ops import (
    attention,
    attention_decode,
    attention_qkv,
    attention_qkv_backward,
    linear_rotary,
    linear_swiglu,
    linear_swiglu_backward_,
    rotary,
    swiglu,
)

Recompute = Literal["none", "norm", "mlp", "full"]


class Projection(NamedTuple):
    """The linear layers into a middle, whose outputs lie side by side in what it takes."""

    y: torch.Tensor  # (tokens, hidden)
    weights: Sequence[torch.Tensor]  # (n, hidden) each
    biases: Sequence[torch.Tensor]  # (n,), one for each weight, or none
    tune: bool  # whether to time products, see matmul

    def run(self) -> torch.Tensor:
        """(tokens, sum of n)."""
        return linears(self.y, self.weights, self.biases, tune=self.tune)


class Middle(Protocol):
    """What lies between a half's two projections. One is made for each call; what backward needs stays in it."""

    keeps: tuple[Recompute, ...]  # under these it stays; under others the half makes it again

    def forward(self, x: Projection, keep: Recompute | None) -> torch.Tensor:
        """Of what x's layers give, (tokens, n): the output projection's input. `keep`: what the table says of it stays for
        backward; None: nothing does."""
        ...

    def backward(self, dout: torch.Tensor, w_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the gradient of the output projection's output: what forward gave (again), and the gradient of what the
        input projection gave."""
        ...


class Swiglu:
    """The middle of the MLP."""

    keeps: tuple[Recompute, ...] = ("none", "norm")

    def forward(self, x: Projection, keep: Recompute | None) -> torch.Tensor:
        if x.biases:
            gate_up = x.run()
            act = swiglu(gate_up)
        else:
            gate_up, act = linear_swiglu(x.y, x.weights, tune=x.tune)
        self.gate_up = gate_up if keep else None
        self.act = act if keep and keep != "norm" else None  # made again, it is at hand
        return act

    def backward(self, dout: torch.Tensor, w_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.gate_up is not None
        act = linear_swiglu_backward_(dout, w_out, self.gate_up, with_act=self.act is None)
        act = self.act if act is None else act
        assert act is not None
        return act, self.gate_up


class Heads(NamedTuple):
    """How the packed qkv of a token is parted."""

    heads: int
    kv_heads: int
    head_dim: int


class Sequences:
    """What all layers share in one forward: positions, rotary tables, where sequences begin and end.

    No tuple and no dataclass: FSDP's mixed precision would round the tables that it finds in one.
    """

    def __init__(
        self,
        positions: torch.Tensor,  # (tokens,)
        cos: torch.Tensor,
        sin: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int,
        dense_shape: tuple[int, ...] | None,  # (batch, seq), or None for a flat row of tokens
        rows: torch.Tensor | None = None,  # (tokens,), the cache's row of each, or None without a cache
    ):
        self.positions, self.cos, self.sin = positions, cos, sin
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self.dense_shape, self.rows = dense_shape, rows


class Attention:
    """The middle of the attention half: rotary, and attention over the sequences, or over a cache."""

    keeps: tuple[Recompute, ...] = ("none", "norm", "mlp")

    def __init__(self, heads: Heads, sequences: Sequences, cache: torch.Tensor | None = None):
        self.heads, self.sequences, self.cache = heads, sequences, cache
        self.kept: Kept | None = None

    def forward(self, x: Projection, keep: Recompute | None) -> torch.Tensor:
        (heads, kv_heads, head_dim), s = self.heads, self.sequences
        if x.biases:
            qkv = x.run().view(len(x.y), -1, head_dim)
            rotary(qkv, s.cos, s.sin, s.positions, heads + kv_heads, inplace=True)
        else:
            qkv = linear_rotary(
                x.y, x.weights, s.cos, s.sin, s.positions, head_dim, heads + kv_heads, tune=x.tune
            )
        shaped = qkv if s.dense_shape is None else qkv.view(*s.dense_shape, *qkv.shape[1:])
        if keep and self.cache is None:
            out, self.kept = attention_qkv(shaped, heads, kv_heads, s.cu_seqlens, s.max_seqlen)
        else:
            out = self._attend(*shaped.split([heads, kv_heads, kv_heads], dim=-2))
        return self._flat(out)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s, cache = self.sequences, self.cache
        if cache is not None:
            cache[:, s.rows, s.positions] = torch.stack((k, v))
            if s.cu_seqlens is None:
                return attention_decode(q, cache[0], cache[1], s.positions + 1)
        return attention(q, k, v, s.cu_seqlens, s.max_seqlen)

    def backward(self, dout: torch.Tensor, w_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s, kept = self.sequences, self.kept
        if kept is None:
            raise RuntimeError("cache: has no backward; takes a forward under torch.no_grad()")
        dout = matmul(dout, w_out).view(kept.out.shape)
        dqkv = attention_qkv_backward(dout, kept, s.cos, s.sin, s.positions)
        return self._flat(kept.out.detach()), dqkv.view(len(s.positions), -1)

    def _flat(self, out: torch.Tensor) -> torch.Tensor:
        return out.reshape(len(self.sequences.positions), self.heads.heads * self.heads.head_dim)


class Settings(NamedTuple):
    """How a model's halves run."""

    recompute: Recompute = "norm"
    accumulate: bool = False  # weight gradients are added to `weight.grad`, and autograd gets none


def half(
    middle: Middle,
    branch: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    w_in: Sequence[torch.Tensor],
    w_out: torch.Tensor,
    eps: float,
    settings: Settings,
    b_in: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """(branch', h), see above. Unchecked: the model that calls it has its shapes from its config.

    Args:
        branch, residual: (tokens, hidden), of one dtype, or no residual before the first half: h is the branch then.
        norm: (hidden,), the norm's weight.
        w_in: weights (n, hidden) whose outputs lie side by side in what the middle takes.
        w_out: (hidden, width).
        b_in: biases (n,) of w_in, one for each weight (as Qwen2 has them), or none.

    Saves as the table says. The first backward uses it up: a second raises RuntimeError.
    """
    if "torch._dynamo" in sys.modules and not _opaque:
        _opaque.append(torch.compiler.disable(_half))
    run = _opaque[0] if _opaque else _half
    return run(middle, branch, residual, norm, w_in, w_out, eps, settings, b_in)


# `_half` as one piece for torch.compile; made when that is there, since it takes seconds to import.
_opaque: list[Callable] = []


def _half(
    middle, branch, residual, norm, w_in, w_out, eps, settings, b_in
) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = (branch, residual, norm, w_out, *w_in, *b_in)
    chosen = backend.choose("rms_norm", branch, None, branch.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Half.apply(middle, eps, settings, chosen, len(w_in), *tensors)
    y, h, _ = rms_norm_forward(branch, norm, eps, residual, chosen)
    # lengths vary where nothing is learned: not worth to time products
    out = middle.forward(Projection(y, w_in, b_in, tune=False), None)
    return matmul(out, w_out.t(), tune=False), h


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, middle, eps, settings, backend, count, branch, residual, norm, w_out, *inner):
        w_in, b_in = inner[:count], inner[count:]
        y, h, rstd = rms_norm_forward(branch, norm, eps, residual, backend)
        keep = settings.recompute if settings.recompute in middle.keeps else None
        out = matmul(middle.forward(Projection(y, w_in, b_in, True), keep), w_out.t())
        ctx.middle, ctx.kept, ctx.eps, ctx.settings, ctx.backend = middle, keep, eps, settings, backend
        ctx.count = count
        ctx.save_for_backward(h, rstd, norm, y if settings.recompute == "none" else None, w_out, *inner)
        return out, h.view_as(h) if h is branch else h

    @staticmethod
    @once_differentiable  # a second derivative raises instead of being wrong
    def backward(ctx: Any, dout: torch.Tensor, dh: torch.Tensor):
        h, rstd, norm, y, w_out, *inner = ctx.saved_tensors
        w_in, b_in = inner[: ctx.count], inner[ctx.count :]
        middle, ctx.middle = ctx.middle, None
        if middle is None:
            raise RuntimeError("openllama: a block's backward ran a second time; takes a forward for each")
        accumulate = ctx.settings.accumulate
        need_branch, need_residual, need_norm, need_out, *need_inner = ctx.needs_input_grad[5:]
        need_in, need_bias = need_inner[: ctx.count], need_inner[ctx.count :]
        if not ctx.kept:
            y = rms_norm_forward(h, norm, ctx.eps, None, ctx.backend)[0] if y is None else y
            middle.forward(Projection(y, w_in, b_in, True), ctx.settings.recompute)
        dout, dh = (checks.rows(t, t.shape[-1]) for t in (dout, dh))
        out, dinner = middle.backward(dout, w_out)
        dw_out = linear_weight_gradient(w_out, dout, out, accumulate) if need_out else None
        del out
        need_dx = need_branch or need_residual
        dy = _project_back(dinner, w_in) if need_dx or need_norm else h  # h: not read
        if y is None and any(need_in):
            y = rms_norm_forward(h, norm, ctx.eps, None, ctx.backend)[0]
        parts = dinner.split([len(w) for w in w_in], dim=1)
        dw_in = [
            linear_weight_gradient(w, d, y, accumulate) if need and y is not None else None
            for w, need, d in zip(w_in, need_in, parts)
        ]
        db_in = [
            give_gradient(b, d.sum(0) if need else None, accumulate)
            for b, need, d in zip(b_in, need_bias, parts)
        ]
        dx, dnorm = rms_norm_backward(dy, dh, h, norm, rstd, ctx.backend, need_dx, need_norm)
        dnorm = give_gradient(norm, dnorm if need_norm else None, accumulate)
        dbranch, dresidual = dx if need_branch else None, dx if need_residual else None
        return None, None, None, None, None, dbranch, dresidual, dnorm, dw_out, *dw_in, *db_in


def _project_back(dout: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The gradient of what went into a Projection."""
    dy = dout.new_empty(len(dout), weights[0].shape[1])
    for i, (weight, part) in enumerate(zip(weights, dout.split([len(w) for w in weights], dim=1))):
        matmul(part, weight, dy, accumulate=i > 0)
    return dy
