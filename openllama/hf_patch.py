"""Our ops in a loaded HuggingFace Llama, Mistral, Qwen2 or Qwen3, in place: `patch`, and `unpatch`.

No weight is moved, copied or renamed. A module's class is replaced by a subclass of it that has another forward and the
same name, so that isinstance, state_dict, save_pretrained, deepcopy, PEFT, DDP and FSDP2 find what they know, and
taking the class back restores the model exactly. What the layers compute is in openllama/hf_layers.py; here are the
model's loop over them and the loss.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from openllama import hf_layers
from openllama.hf_layers import OPTIONS, ORIGINAL, Causal, Options, autocasts, drops, is_ours, is_plain
from openllama.ops import linear_cross_entropy

#: Versions of transformers that this was tried with.
TRIED = ("5.17.0", "5.24.0")

#: HuggingFace's folder of a model, and how the names of its classes begin.
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def patch(
    model: AnyModule, *, block: bool = True, logits: bool = False, untried_version: bool = False
) -> AnyModule:
    """Puts our ops into a HuggingFace model, in place: norms, rotary, attention, SwiGLU, whole layers, the loss.

    In training (`model.train()`) with labels, no logits are made: the output's `logits` is None, as with Liger's patch, and
    no cache unless `use_cache` says so. In eval mode both are as HuggingFace has them.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 of transformers (any *ForCausalLM or *Model), or what wraps one (PEFT, TRL,
            DDP). Before `accelerate` replaces its forward, so before `Trainer.train` or `Accelerator.prepare`; before or
            after `fully_shard` and PEFT's adapters.
        block: run a decoder layer as two autograd nodes written by hand, where all of it is plain (hf_layers.py has when);
            False: op by op always.
        logits: training gives logits too, and HuggingFace's own loss: for loops that read them (TRL's SFTTrainer does for
            its accuracy).
        untried_version: take a version of transformers that this was not tried with.

    Returns:
        The model. Patched again, it only takes the new options.

    Raises:
        TypeError: another architecture. ValueError: an untried version of transformers, or a module whose forward is
        replaced on the instance already.
    """
    parts = [(name, module) for name, module in model.named_modules() if _kind(type(module)) is not None]
    if not any(_kind(type(module)) == "Model" for _, module in parts):
        takes = ", ".join(f"{prefix}Model" for prefix in ARCHITECTURES.values())
        raise TypeError(
            f"model: got {type(model).__name__}, takes one of transformers' {takes}, their ForCausalLM, or a wrapper of one"
        )
    _check_version(untried_version)
    _check_forwards(parts)
    for _, module in parts:
        if not is_ours(module):
            module.__class__ = patched_class(type(module))  # type: ignore[assignment]
        module.__dict__[OPTIONS] = Options(block, logits)
    return model


def unpatch(model: AnyModule) -> AnyModule:
    """Takes our ops out again, and returns the model; one that isn't patched stays as it is.

    Raises ValueError where a module's forward was replaced on the instance since, which holds on to ours.
    """
    parts = [(name, module) for name, module in model.named_modules() if is_ours(module)]
    _check_forwards(parts)
    for _, module in parts:
        module.__class__ = _unpatched_class(type(module))
        module.__dict__.pop(OPTIONS, None)
    return model


def _check_version(untried: bool) -> None:
    found = version("transformers")

    if found not in TRIED and not untried:
        raise ValueError(
            f"transformers: got version {found}, takes {' or '.join(TRIED)}, which patch was tried with; "
            "patch(model, untried_version=True) goes on all the same"
        )


def _check_forwards(parts: list[tuple[str, nn.Module]]) -> None:
    for name, module in parts:
        if "forward" in vars(module):
            raise ValueError(
                f"model: got {name or 'a model'} whose forward is replaced on the instance (by accelerate or another "
                "patch), takes it without: patch before, or take that back first"
            )


# ---------------------------------------------------------------- classes


def _kind(cls: type) -> str | None:
    """What a class is to us: a key of _FORWARDS; None for others, and where a subclass has a forward of its own."""
    for base in cls.__mro__:
        for folder, prefix in ARCHITECTURES.items():
            kind = base.__name__.removeprefix(prefix)
            if base.__module__ == f"transformers.models.{folder}.modeling_{folder}" and kind in _FORWARDS:
                same = inspect.unwrap(cls.forward) is inspect.unwrap(base.forward)  # type: ignore[attr-defined]
                return kind if same else None
    return None


@functools.cache
def patched_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass with our forward. Of one name with it: transformers, accelerate and checkpoints go by names."""
    kind = _kind(cls)
    assert kind is not None
    theirs = cls.forward
    forward = functools.wraps(theirs)(_FORWARDS[kind](theirs))  # Trainer and generate read its signature
    same = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {"forward": forward, "__reduce_ex__": _reduce, ORIGINAL: cls, **same})


def _unpatched_class(cls: type) -> type:
    """`cls` without ours: that which ours was made of; or, where FSDP2 made one of ours, the same made of theirs."""
    if ORIGINAL in vars(cls):
        return vars(cls)[ORIGINAL]
    if not hasattr(cls, ORIGINAL):
        return cls
    own = {k: v for k, v in vars(cls).items() if k not in ("forward", "__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(map(_unpatched_class, cls.__bases__)), own)


def _reduce(self: nn.Module, protocol: Any) -> tuple:
    """For pickle, which would look our class up by its name and find theirs; copy goes this way too."""
    made = object.__reduce_ex__(self, max(int(protocol), 2))
    original = vars(type(self)).get(ORIGINAL)
    return made if original is None else (_blank, (original,), *made[2:])  # type: ignore[return-value]


def _blank(original: type[nn.Module]) -> nn.Module:
    cls = patched_class(original)
    return cls.__new__(cls)


# ---------------------------------------------------------------- model and loss


def _by_name(theirs: Callable) -> Callable[[tuple, dict[str, Any]], dict[str, Any]]:
    """A function that gives a forward's arguments by name."""
    names = list(inspect.signature(theirs).parameters)[1:]
    return lambda args, kwargs: {**dict(zip(names, args)), **kwargs}


def _model_forward(theirs: Callable) -> Callable:
    by_name = _by_name(theirs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = by_name(args, kwargs)
        if self.training and torch.is_grad_enabled() and _cache_is_useless(kwargs):
            kwargs["use_cache"] = False
        causal = _causal(self, kwargs)
        return theirs(self, **kwargs) if causal is None else _run_layers(self, kwargs, causal)

    return forward


def _cache_is_useless(kwargs: dict[str, Any]) -> bool:
    """Whether the cache that their forward makes by default only costs. (With one, they take position ids that restart for
    one document, without for several: what they would do stays.)"""
    asked = any(kwargs.get(key) is not None for key in ("use_cache", "cache", "past_key_values"))
    documents = kwargs.get("cu_seq_lens_q") is not None or kwargs.get("attention_mask") is not None
    return not asked and (documents or kwargs.get("position_ids") is None)


# What our own loop over the layers takes.
_INPUTS = {"input_ids", "inputs_embeds", "position_ids", "return_dict", "num_items_in_batch"}
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def _causal(model: Any, kwargs: dict[str, Any]) -> Causal | None:
    """That attention is causal, or packed by cu_seqlens, and nothing else is asked for; known without a look at values.

    Otherwise HuggingFace's forward runs, with its own masks. Those of a mask of ones, and of position ids that don't
    restart, are None for SDPA; it waits for the GPU to learn so, once a forward.
    """
    c = model.config
    given = {key for key, value in kwargs.items() if value is not None and value is not False}
    use_cache = kwargs.get("use_cache")
    cached = c.use_cache if use_cache is None else use_cache
    recorded = getattr(c, "output_hidden_states", False) or getattr(c, "output_attentions", False)
    if given - _INPUTS - _PACKING or cached or recorded or not getattr(c, "is_causal", True):
        return None
    if not kwargs.get("return_dict", c.return_dict) or (model.training and c.attention_dropout > 0):
        return None
    if ("input_ids" in given) == ("inputs_embeds" in given):
        return None  # their error
    # a layer that went to HuggingFace's attention all the same would find no mask there
    if not all(is_ours(layer) and is_ours(a := layer.self_attn) and not drops(a) for layer in model.layers):
        return None
    inputs = kwargs["input_ids" if "input_ids" in given else "inputs_embeds"]
    if type(inputs) is not torch.Tensor and type(inputs) is not nn.Parameter:
        return None  # sharded, say
    batch, seq = inputs.shape[:2]
    borders, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if borders is None:
        known, longest = not given & ({"position_ids"} | _PACKING), seq
    else:
        known = batch == 1
    window = getattr(c, "sliding_window", None)
    if not known or not isinstance(longest, int) or (window is not None and longest > window):
        return None
    return Causal(None if borders is None else borders.int(), longest)


def _run_layers(model: Any, kwargs: dict[str, Any], causal: Causal) -> Any:
    """HuggingFace's loop without the mask, whose making waits for the GPU."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    x, position_ids = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
    x = model.embed_tokens(kwargs["input_ids"]) if x is None else x
    if position_ids is None:
        position_ids = torch.arange(x.shape[1], device=x.device)[None]
    shared = {
        "attention_mask": None,
        "position_ids": position_ids,
        "position_embeddings": model.rotary_emb(x, position_ids),
        "use_cache": False,
        "openllama_causal": causal,
    }
    for layer in model.layers[: model.config.num_hidden_layers]:
        x = layer(x, **shared)
    return BaseModelOutputWithPast(last_hidden_state=model.norm(x))


def _causal_lm_forward(theirs: Callable) -> Callable:
    by_name = _by_name(theirs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = by_name(args, kwargs)
        if not _loss_is_ours(self, kwargs):
            return theirs(self, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return_dict = kwargs.pop("return_dict", None)
        loss_inputs = {key: kwargs.pop(key, None) for key in ("labels", "shift_labels", "num_items_in_batch")}
        ignore_index = kwargs.pop("ignore_index", -100)
        kwargs.pop("logits_to_keep", None)
        outputs = self.model(**kwargs)
        loss = causal_lm_loss(
            outputs.last_hidden_state, self.lm_head.weight, **loss_inputs, ignore_index=ignore_index
        )
        others = {key: value for key, value in outputs.items() if key != "last_hidden_state"}
        result = CausalLMOutputWithPast(loss=loss, **others)
        return (
            result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()
        )

    return forward


def _loss_is_ours(model: Any, kwargs: dict[str, Any]) -> bool:
    """In training with labels, of all logits, with a head that nothing replaces and HuggingFace's own loss."""
    options = vars(model).get(OPTIONS)  # none: a new model of a patched one's class
    if kwargs.get("labels") is None or not model.training or options is None or options.logits:
        return False
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, torch.Tensor) or keep:
        return False
    if not is_plain(model.lm_head) or model.lm_head.bias is not None:
        return False
    return getattr(model.loss_function, "__name__", "") == "ForCausalLMLoss"


def causal_lm_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
    ignore_index: int,
) -> torch.Tensor:
    """HuggingFace's ForCausalLMLoss of hidden @ weight.T, in fp32: a mean, or the sum over `num_items_in_batch`.

    hidden: (batch, seq, hidden); labels: (batch, seq), of which token n predicts n + 1; shift_labels: the same, shifted.
    Where no label counts it is 0, theirs NaN.
    """
    if autocasts(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    h, labels = hidden.reshape(-1, hidden.shape[-1]), shift_labels.reshape(-1).to(hidden.device)
    if num_items_in_batch is None:
        return linear_cross_entropy(h, weight, labels, ignore_index=ignore_index)
    # as a weight of each row: divided afterwards, the gradients that forward has made would all be read again
    count = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=h.device).reshape(1)
    weights = (1 / count).expand(len(labels)).contiguous()
    return linear_cross_entropy(
        h, weight, labels, weights=weights, ignore_index=ignore_index, reduction="sum"
    )


_FORWARDS: dict[str, Callable[[Callable], Callable]] = {
    "RMSNorm": hf_layers.rms_norm_forward,
    "RotaryEmbedding": hf_layers.rotary_embedding_forward,
    "Attention": hf_layers.attention_forward,
    "MLP": hf_layers.mlp_forward,
    "DecoderLayer": hf_layers.decoder_layer_forward,
    "Model": _model_forward,
    "ForCausalLM": _causal_lm_forward,
}
