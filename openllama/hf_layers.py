"""What a patched HuggingFace layer computes, and which way: openllama/hf_patch.py puts these forwards in.

A decoder layer has two ways for each of its halves (attention, MLP), chosen at every call:

- block: the half of openllama/block.py over HuggingFace's own weights, one autograd node. Only where all of the half is
  plain: causal or packed attention without cache, mask, window or dropout; linear layers that nothing has replaced,
  quantised, sharded or hooked; silu; one dtype; no autocast, and no gradient checkpointing but the reentrant one.
- ops: their modules are called as they are, LoRA's among them, and what lies between is ours: the norms (with the residual
  add in the second), rotary, SwiGLU, and attention where it is causal or packed. With a cache or a mask it is that of
  HuggingFace.

A layer takes and gives one tensor, so that hooks, checkpoints and sharding by layer see what they know. Carrying the last
branch to the next layer's norm instead would save one read of (tokens, hidden) a layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from openllama import block
from openllama.kernels import checks
from openllama.ops import attention, rms_norm, rotary, swiglu

#: The attribute of a class of ours that names HuggingFace's, and that of an instance which holds its Options.
ORIGINAL, OPTIONS = "_openllama_original", "_openllama"

_TENSORS = (torch.Tensor, nn.Parameter)  # neither a DTensor nor a quantised weight


class Options(NamedTuple):
    """How a patched model runs; see `patch`."""

    block: bool = True
    logits: bool = False


class Tables(tuple):
    """HuggingFace's (cos, sin), rounded to the hidden dtype as they make them, and ours beside them, in fp32.

    A tuple for whoever else reads it; a class of its own because FSDP2 rounds every fp32 tensor that it finds in a layer's
    tuples. Where its entries are moved to another device a new one is made, and ours are then taken from those.
    """

    ours: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


class Causal:
    """That a token sees what is before it in its document and nothing masks it besides.

    No tuple, so that what moves or casts a layer's arguments leaves it alone.
    """

    def __init__(self, cu_seqlens: torch.Tensor | None = None, max_seqlen: int = 0):
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen


def is_ours(module: nn.Module) -> bool:
    return hasattr(type(module), ORIGINAL)


def is_bare(module: nn.Module, harmless: str = "") -> bool:
    """Whether nothing is hooked to the module, so that reading its weights is as good as calling it."""
    state = module.__dict__
    if "forward" in state or state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return False
    if state["_forward_pre_hooks"]:
        return False
    hooks = state["_forward_hooks"]
    return not hooks or all(getattr(hook, "__name__", "") == harmless for hook in hooks.values())


def is_plain(linear: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Whether it is a linear layer whose product is x W^T + b and no more; in `dtype`, where given."""
    if type(linear) is not nn.Linear or not is_bare(linear):
        return False
    weight = linear.weight
    return type(weight) in _TENSORS and (dtype is None or weight.dtype == dtype)


def autocasts(x: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


# ---------------------------------------------------------------- norms, rotary tables


def rms_norm_forward(theirs: Callable) -> Callable:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if not _norm_takes(self, hidden_states):
            return theirs(self, hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _norm_takes(norm: Any, x: torch.Tensor) -> bool:
    """Theirs gives fp32 for a half-precision x and an fp32 weight, which only autocast has a use for."""
    weight = norm.weight
    if type(x) not in _TENSORS or type(weight) not in _TENSORS:
        return False
    return weight.dtype == x.dtype or (weight.dtype == torch.float32 and autocasts(x))


def _add_and_norm(
    norm: Any, branch: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(h), h) of h = branch + residual."""
    if is_ours(norm) and is_bare(norm) and _norm_takes(norm, branch) and branch.dtype == residual.dtype:
        return rms_norm(branch, norm.weight, norm.variance_epsilon, residual)
    h = residual + branch
    return norm(h), h


def rotary_embedding_forward(theirs: Callable) -> Callable:
    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Tables:
        # theirs reads x's dtype and device alone, and rounds the tables to the one: bf16 can't tell far positions apart
        cos, sin = theirs(self, x.new_empty(0, dtype=torch.float32), position_ids)
        tables = Tables((cos.to(x.dtype), sin.to(x.dtype)))
        tables.ours = _narrow(cos, sin, len(x))
        return tables

    return forward


def _narrow(
    cos: torch.Tensor, sin: torch.Tensor, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cos, sin, positions) as `ops.rotary` takes them, of theirs: (batch or 1, seq, head_dim), the halves equal."""
    half = cos.shape[-1] // 2
    rows = [t[..., :half].float().reshape(-1, half).contiguous() for t in (cos, sin)]
    positions = torch.arange(len(rows[0]), dtype=torch.int32, device=cos.device)
    return rows[0], rows[1], positions.repeat(batch // len(cos))


def _tables(position_embeddings: Any, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ours = getattr(position_embeddings, "ours", None)
    cos, sin = position_embeddings
    return _narrow(cos, sin, batch) if ours is None else ours


# ---------------------------------------------------------------- ops


def mlp_forward(theirs: Callable) -> Callable:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not _is_silu(self.act_fn):
            return theirs(self, x)
        # The copy side by side costs a pass. Two kernels of torch and what they save for backward cost more.
        return self.down_proj(swiglu(torch.cat((self.gate_proj(x), self.up_proj(x)), dim=-1)))

    return forward


def _is_silu(activation: Any) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def attention_forward(theirs: Callable) -> Callable:
    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        openllama_causal: Causal | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if type(hidden_states) not in _TENSORS or position_embeddings is None:
            return theirs(self, hidden_states, position_embeddings, attention_mask, **kwargs)
        cache = _pop_cache(kwargs)
        batch, seq = hidden_states.shape[:2]
        q, k, v = _rotated_qkv(self, hidden_states, position_embeddings)
        weights = None
        if openllama_causal is not None and cache is None and not drops(self):
            out = _causal_attention(q, k, v, openllama_causal, self.scaling)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            if cache is not None:
                k, v = cache.update(k, v, self.layer_idx)
            run = _their_attention(self, theirs)
            dropout = self.attention_dropout if self.training else 0.0
            out, weights = run(
                self,
                q,
                k,
                v,
                attention_mask,
                dropout=dropout,
                scaling=self.scaling,
                **_window(self),
                **kwargs,
            )
        return self.o_proj(out.reshape(batch, seq, -1)), weights

    return forward


def _rotated_qkv(attn: Any, x: torch.Tensor, position_embeddings: Any) -> list[torch.Tensor]:
    """q, k and v, (batch, seq, heads, head_dim), through whatever stands for their projections."""
    batch, seq = x.shape[:2]
    qkv = [proj(x).view(batch, seq, -1, attn.head_dim) for proj in (attn.q_proj, attn.k_proj, attn.v_proj)]
    if "q_norm" in attn._modules:
        qkv[:2] = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
    tables = _tables(position_embeddings, batch)
    qkv[:2] = (rotary(t.flatten(0, 1), *tables).view(t.shape) for t in qkv[:2])
    return qkv


def _causal_attention(q, k, v, causal: Causal, scale: float) -> torch.Tensor:
    if causal.cu_seqlens is None:
        return attention(q, k, v, scale=scale)
    borders, (q, k, v) = causal.cu_seqlens.to(q.device), (t.flatten(0, 1) for t in (q, k, v))
    return attention(q, k, v, borders, causal.max_seqlen, scale=scale)


def _their_attention(attn: Any, theirs: Callable) -> Callable:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # seconds to import; there by now

    eager = vars(sys.modules[theirs.__module__])["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, eager)


def _window(attn: Any) -> dict[str, int]:
    """What Mistral (config) and Qwen (each layer) tell HuggingFace's attention besides."""
    window = getattr(attn, "sliding_window", getattr(attn.config, "sliding_window", None))
    return {} if window is None else {"sliding_window": window}


def drops(attn: Any) -> bool:
    return attn.training and attn.attention_dropout > 0


def _pop_cache(kwargs: dict[str, Any]) -> Any:
    """The cache, by its name in transformers 5.24 or in 5.17. (An empty one is false.)"""
    older, newer = kwargs.pop("past_key_values", None), kwargs.pop("cache", None)
    return older if newer is None else newer


# ---------------------------------------------------------------- decoder layer


def decoder_layer_forward(theirs: Callable) -> Callable:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tables = kwargs.get("position_embeddings")
        causal = kwargs.pop("openllama_causal", None) or _known_causal(self, kwargs)
        if args or tables is None or type(hidden_states) not in _TENSORS:
            return theirs(self, hidden_states, *args, **kwargs)
        x, blocks = hidden_states, causal is not None and _blocks_run(self, hidden_states)
        attn = _attention_weights(self, x, kwargs) if blocks else None
        if attn is not None and causal is not None:
            branch, h = _attention_half(self, x, attn, causal, tables)
        else:
            known = {"openllama_causal": causal} if causal is not None and is_ours(self.self_attn) else {}
            branch, _ = self.self_attn(hidden_states=self.input_layernorm(x), **known, **kwargs)
            h = x
        mlp = _mlp_weights(self, x) if blocks else None
        if mlp is not None:
            branch, h = _run_half(block.Swiglu(), branch, h, self.post_attention_layernorm, mlp)
        else:
            y, h = _add_and_norm(self.post_attention_layernorm, branch.view_as(x), h.view_as(x))
            branch = self.mlp(y)
        return (h + branch).view_as(x)

    return forward


def _known_causal(layer: Any, kwargs: dict[str, Any]) -> Causal | None:
    """For SDPA, HuggingFace makes no mask where attention is causal and nothing else: no padding, packing or window.

    That holds of no other implementation. (Of our own model forward, which knows more, the layer gets a Causal.)
    """
    if kwargs.get("attention_mask") is not None or kwargs.get("is_causal") is False:
        return None
    if kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None:
        return None
    attn = layer.self_attn
    if not is_ours(attn) or attn.config._attn_implementation != "sdpa" or not attn.is_causal:
        return None
    return Causal()


def _blocks_run(layer: Any, x: torch.Tensor) -> bool:
    """Whether the layer may run as blocks, as far as that is not a question of its parts.

    Not where hooks take what is saved for backward, as a checkpoint's do (all but the reentrant one's, which runs without
    gradients first) and save_on_cpu: a block keeps more beside it, that they would not see, and not free.
    """
    options = layer.__dict__.get(OPTIONS)
    if options is None or not options.block or autocasts(x):
        return False
    if _saving_hooks is None or torch.compiler.is_compiling():
        return not (layer.training and layer.gradient_checkpointing)
    return _saving_hooks(True) is None


# No public name, but torch's own compiler asks by it.
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # type: ignore[attr-defined]


class _Weights(NamedTuple):
    """Of the linear layers of a half."""

    w_in: Sequence[torch.Tensor]
    b_in: Sequence[torch.Tensor]
    w_out: torch.Tensor


def _weights(
    norm: nn.Module, inner: Sequence[nn.Module], out: nn.Module, dtype: torch.dtype
) -> _Weights | None:
    """None where a part of the half is not plain."""
    if not (is_ours(norm) and is_bare(norm)):
        return None
    scale = norm.weight
    if type(scale) not in _TENSORS or scale.dtype != dtype:
        return None
    for linear in (*inner, out):
        if not is_plain(linear, dtype):
            return None
    if out.bias is not None:
        return None
    biases = [bias for bias in (linear.bias for linear in inner) if bias is not None]
    if len(biases) not in (0, len(inner)):
        return None
    return _Weights([linear.weight for linear in inner], biases, out.weight)  # type: ignore[arg-type]


def _attention_weights(layer: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> _Weights | None:
    attn = layer.self_attn
    if not is_bare(attn):
        # transformers leaves a hook here for good once any output is recorded; it matters while attentions are asked for
        recorded = kwargs.get("output_attentions") or getattr(attn.config, "output_attentions", False)
        if recorded or not is_bare(attn, "output_capturing_hook"):
            return None
    if drops(attn) or "q_norm" in attn._modules or attn.scaling != attn.head_dim**-0.5:
        return None
    return _weights(layer.input_layernorm, (attn.q_proj, attn.k_proj, attn.v_proj), attn.o_proj, x.dtype)


def _mlp_weights(layer: Any, x: torch.Tensor) -> _Weights | None:
    mlp = layer.mlp
    if not (is_ours(mlp) and is_bare(mlp) and _is_silu(mlp.act_fn)):
        return None
    return _weights(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), mlp.down_proj, x.dtype)


def _attention_half(layer: Any, x: torch.Tensor, weights: _Weights, causal: Causal, tables: Any):
    batch, seq = x.shape[:2]
    cos, sin, positions = _tables(tables, batch)
    head_dim = layer.self_attn.head_dim
    heads, kv_heads = (len(w) // head_dim for w in weights.w_in[:2])
    if causal.cu_seqlens is None:
        sequences = block.Sequences(positions, cos, sin, None, seq, (batch, seq))
    else:
        borders = causal.cu_seqlens.to(x.device)
        sequences = block.Sequences(positions, cos, sin, borders, causal.max_seqlen, None)
    middle = block.Attention(block.Heads(heads, kv_heads, head_dim), sequences)
    return _run_half(middle, x, None, layer.input_layernorm, weights)


def _run_half(
    middle: block.Middle, branch: torch.Tensor, residual: torch.Tensor | None, norm: Any, weights: _Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = branch.shape[-1]
    branch = checks.rows(branch, hidden)
    residual = None if residual is None else checks.rows(residual, hidden)
    w_in, b_in, w_out = weights
    eps, settings = norm.variance_epsilon, block.Settings()
    return block.half(middle, branch, residual, norm.weight, w_in, w_out, eps, settings, b_in)
