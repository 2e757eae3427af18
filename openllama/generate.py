"""Sampling: several prompts at once, ids with `sample` and text with `generate`.

One packed pass reads the prompts; then each step computes one token of each prompt that has not ended, with the keys and
values of what came before in a cache (openllama/decoder.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

from openllama.decoder import Decoder
from openllama.model import Llama
from openllama.tokenizer import Tokenizer


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
    on_token: Callable[[int, int], bool | None] | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
        model: on any device and in any dtype; logits are sampled from in fp64.
        prompts: ids of each, at least one (bos, where the model was trained with it). Lengths may differ: no padding.
            A context that outgrows the model's max_positions loses its oldest quarter (see `Decoder`, also for the
            cache's memory).
        max_new_tokens: at most so many for each prompt.
        temperature: divides the logits; 0: always the likeliest token (the lowest id among equals).
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together reach this probability, at least one (Holtzman et al., 2020).
            Applied after top_k, on its renormalised probabilities.
        seed: prompt i draws from a generator of its own, seeded with seed + i, on the CPU: what it gets does not depend
            on the other prompts' draws. (Their presence can change the last bits of a matrix product's sums.)
        eos_id: a prompt ends where this id is drawn; None: never.
        on_token: called with (prompt's index, new id) for each new token; where it returns True, the prompt ends
            with that id.
        vocab_size: ids from here on are never drawn (rows that only pad the table); None: the model's vocabulary.

    Returns:
        The new ids of each prompt, without the prompt and without eos_id.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    limit = model.config.vocab_size if vocab_size is None else vocab_size
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, seed, limit)
    new: list[list[int]] = [[] for _ in prompts]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    decoder = Decoder(model, prompts, max_new_tokens)
    open_prompts = list(range(len(prompts)))  # the prompt of each of the decoder's rows
    for _ in range(max_new_tokens):
        drawing = [generators[i] for i in open_prompts]
        tokens = _draw(decoder.logits()[:, :limit], temperature, top_k, top_p, drawing)
        still_open = []
        for row, (i, token) in enumerate(zip(open_prompts, tokens)):
            if token == eos_id:
                continue
            new[i].append(token)
            if on_token is not None and on_token(i, token):
                continue
            decoder.append(row, token)
            still_open.append(row)
        decoder.keep(still_open)
        open_prompts = [open_prompts[row] for row in still_open]
        if not open_prompts:
            break
    return new


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[str]:
    """Continues each text, to eos, to a stop string or for max_new_tokens.

    Args:
        model, max_new_tokens, temperature, top_k, top_p, seed, on_token: as in `sample`.
        tokenizer: the model's.
        prompts: text of each, may be empty; bos goes before it, as before a document in training.
        stop: strings, none empty, that end a prompt. The one that is whole first counts, the longest of several that
            end together, wherever the borders of tokens lie.
        on_text: called with (prompt's index, piece) as soon as more of its text is sure: whole characters, which are no
            start of a stop string (those that still wait when a prompt ends come when all have ended). The pieces of a
            prompt join to what is returned.

    Returns:
        The new text of each prompt, without the prompt and without the stop string. Bytes that are no UTF-8 give U+FFFD.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
        raise TypeError(f"prompts: got {prompts!r}, takes a list of texts")
    if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"stop: got {stop!r}, takes a list of strings that are not empty")
    texts = [
        _Text(tokenizer, stop, functools.partial(on_text, i) if on_text else None)
        for i in range(len(prompts))
    ]

    def ends(i: int, token: int) -> bool | None:
        asked = on_token is not None and on_token(i, token)
        return texts[i].add(token) or asked

    sample(
        model,
        [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts],
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        seed,
        eos_id=tokenizer.eos_id,
        on_token=ends,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
    )
    return [text.close() for text in texts]


class _Text:
    """The text of a growing row of ids, up to a stop string.

    What is given out stays: bytes that may be the start of a character wait as ids, characters that may be the start of
    a stop string as text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], write: Callable[[str], None] | None):
        self.tokenizer, self.stop, self.write = tokenizer, stop, write
        self.ids: list[int] = []
        self.held = ""
        self.text = ""

    def add(self, token: int) -> bool:
        """Takes the next id; whether a stop string is whole now."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        # Bytes are decoded one at a time where they are no character, so only at the end may one still become whole.
        return not text.endswith("\N{REPLACEMENT CHARACTER}") and self._take(text)

    def close(self) -> str:
        """All of the text, with what had waited; nothing goes on after it."""
        self._take(self.tokenizer.decode(self.ids))
        self._give(self.held)
        return self.text

    def _take(self, text: str) -> bool:
        self.ids, text = [], self.held + text
        found = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]  # (end, start)
        sure = min(found)[1] if found else len(text) - self._start_of_stop(text)
        self._give(text[:sure])
        self.held = "" if found else text[sure:]
        return bool(found)

    def _start_of_stop(self, text: str) -> int:
        """How many characters at the end of the text are the start of a stop string."""
        lengths = (n for s in self.stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
        return max(lengths, default=0)

    def _give(self, text: str) -> None:
        self.text += text
        if text and self.write is not None:
            self.write(text)


def _draw(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generators: Sequence[torch.Generator]
) -> list[int]:
    """An id of each row of logits, (rows, vocab), each drawn with a generator of its own, on the CPU.

    What a generator gives is one number in [0, 1), where it cuts the row's distribution. The rest is done on the
    logits' device, in fp64: only the ids come to the host.
    """
    if not logits.isfinite().all():
        raise ValueError("model: its logits are not finite; the weights are damaged or the run has diverged")
    if temperature == 0:
        return logits.argmax(-1).tolist()
    # Shifted before it is divided: a tiny temperature would overflow otherwise.
    values = (logits - logits.amax(-1, keepdim=True)).double() / temperature
    ids = None  # of the values, where they are no longer in the vocabulary's order
    if top_k:
        values, ids = values.topk(min(top_k, values.shape[-1]))
    elif top_p < 1:
        values, ids = values.sort(descending=True, stable=True)
    probabilities = values.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # what likelier tokens hold
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    below = probabilities.cumsum(-1)
    total = below[:, -1:].contiguous()
    uniform = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
    wanted = uniform.to(logits.device)[:, None] * total
    # The product may round up to the total; what lies there has no probability of its own.
    at = torch.minimum(torch.searchsorted(below, wanted, right=True), torch.searchsorted(below, total))
    return (at if ids is None else ids.gather(-1, at)).flatten().tolist()


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
