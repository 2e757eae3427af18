"""Sampling: several prompts at once, as one pack of documents that never see each other.

Every step recomputes the whole context: there is no key-value cache yet, so n new tokens cost n forward
passes over it. That is fine for samples of a few hundred tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from openllama.model import Llama


@torch.no_grad()  # not inference_mode: the model keeps its rotary tables, and training could not use such ones
def sample(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
        model: on any device and in any dtype; logits are sampled from in fp32.
        prompts: ids of each, at least one (bos, where the model was trained with it). Lengths may differ: no padding.
            A context longer than the model's max_positions loses its oldest tokens.
        max_new_tokens: at most so many for each prompt.
        temperature: divides the logits; 0: always the likeliest token (the lowest id among equals).
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together reach this probability, at least one (Holtzman et al., 2020).
            Applied after top_k, on its renormalised probabilities.
        seed: prompt i draws from a generator of its own, seeded with seed + i, on the CPU: what it gets does not depend
            on the other prompts' draws. (Their presence can change the last bits of a matrix product's sums.)
        eos_id: a prompt ends where this id is drawn; None: never.
        on_token: called with (prompt's index, new id) for each new token.
        vocab_size: ids from here on are never drawn (rows that only pad the table); None: the model's vocabulary.

    Returns:
        The new ids of each prompt, without the prompt and without eos_id.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    limit = model.config.vocab_size if vocab_size is None else vocab_size
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, seed, limit)
    contexts = [list(p) for p in prompts]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    open_prompts = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not open_prompts:
            break
        logits = last_logits(model, [contexts[i] for i in open_prompts])[:, :limit].float().cpu()
        still_open = []
        for i, row in zip(open_prompts, logits):
            token = _draw(row, temperature, top_k, top_p, generators[i])
            if token == eos_id:
                continue
            contexts[i].append(token)
            still_open.append(i)
            if on_token is not None:
                on_token(i, token)
        open_prompts = still_open
    return [context[len(prompt) :] for context, prompt in zip(contexts, prompts)]


def last_logits(model: Llama, contexts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits after the last token of each context, (contexts, vocab), from one packed forward pass.

    A context longer than max_positions is cut at its front. The head runs on the last tokens only.
    """
    device = model.embed.weight.device
    windows = [list(c[-model.config.max_positions :]) for c in contexts]
    lengths = torch.tensor([len(w) for w in windows])
    ends = lengths.cumsum(0)  # (contexts,)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(device, torch.int32)
    positions = torch.cat([torch.arange(len(w), dtype=torch.int32) for w in windows]).to(device)
    ids = torch.tensor([i for w in windows for i in w], device=device)
    hidden = model.hidden_states(ids, positions, cu_seqlens, int(lengths.max()))  # (tokens, hidden)
    return model.head(hidden[(ends - 1).to(device)])


def _draw(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One id from logits, (vocab,) fp32 on the CPU."""
    if not logits.isfinite().all():
        raise ValueError("model: its logits are not finite; the weights are damaged or the run has diverged")
    if temperature == 0:
        return int(logits.argmax())
    # Shifted before it is divided: a tiny temperature would overflow otherwise.
    scaled = (logits - logits.max()) / temperature
    values, ids = scaled.topk(min(top_k, len(scaled))) if top_k else scaled.sort(descending=True, stable=True)
    probabilities = values.softmax(0)
    if top_p < 1:
        before = probabilities.cumsum(0) - probabilities  # what likelier tokens hold
        probabilities = probabilities.masked_fill(before >= top_p, 0)
        probabilities[0] = max(float(probabilities[0]), 1e-30)  # the likeliest stays, whatever the rounding
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def _check(model, prompts, max_new_tokens, temperature, top_k, top_p, seed, limit) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts: got {prompts!r}, takes a list of at least one list of ids")
    vocab = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, (str, int)):
            raise TypeError(
                f"prompts[{i}]: got {prompt!r}, takes a list of ids; encode text with the tokenizer"
            )
        if not len(prompt):
            raise ValueError(f"prompts[{i}]: got no id, takes at least one (bos where there is no text)")
        for wrong in (t for t in prompt if not 0 <= t < vocab):
            raise ValueError(f"prompts[{i}]: got id {wrong}, takes 0 to {vocab - 1} (the model's vocabulary)")
    if not _is_whole(max_new_tokens) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, takes a whole number of at least 0")
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature: got {temperature!r}, takes a finite number of at least 0 (0: the likeliest)"
        )
    if not _is_whole(top_k) or top_k < 0:
        raise ValueError(f"top_k: got {top_k!r}, takes a whole number of at least 0 (0: all tokens)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p!r}, takes a number above 0 and at most 1 (1: all tokens)")
    if not _is_whole(seed) or not 0 <= seed < 2**62:
        raise ValueError(f"seed: got {seed!r}, takes a whole number from 0 to below 2^62")
    if not _is_whole(limit) or not 1 <= limit <= vocab:
        raise ValueError(f"vocab_size: got {limit!r}, takes 1 to the model's {vocab}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
