"""Forward and backward of one micro-batch, launch by launch or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from openllama import devices
from openllama.data.loader import Batch
from openllama.model import Llama, flops_per_token

Inputs = dict[str, Any]  # of the model's forward
MicroStep = Callable[[torch.nn.Module, Batch, torch.Tensor], torch.Tensor]

HOST_SECONDS = 3.5e-3  # to launch a layer's kernels, forward and backward (an H200's host, 16 cores)
SUSTAINED = 0.5  # of the card's peak, in a training step
WARMUP = 3  # micro-batches of a shape before its graph: matrix products are timed at the third


def model_inputs(batch: Batch, device: torch.device) -> Inputs:
    """A batch as the model's forward takes it, its tensors on `device`. On a GPU, nothing waits for it."""

    def put(t: torch.Tensor) -> torch.Tensor:
        return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t

    if device.type == "cuda" and is_dense(batch):  # dense attention is faster there
        rows = (-1, batch.max_seqlen)
        return {"ids": put(batch.ids).view(rows), "labels": put(batch.labels).view(rows)}
    return {
        "ids": put(batch.ids),
        "labels": put(batch.labels),
        "positions": put(batch.positions),
        "cu_seqlens": put(batch.cu_seqlens),
        "max_seqlen": batch.max_seqlen,
    }


def is_dense(batch: Batch) -> bool:
    """Whether all pieces are equally long."""
    return bool((batch.cu_seqlens.diff() == batch.max_seqlen).all())


def micro_step(engine: torch.nn.Module, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
    """Adds the gradients of the batch's summed loss times `scale`; returns that loss, detached."""
    return _run(engine, model_inputs(batch, scale.device) | {"scale": scale})


def _run(engine: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    loss = engine(**inputs)
    loss.backward()
    for p in engine.parameters():  # gradients that autograd made itself, in new memory
        buffer = getattr(p, "grad_buffer", None)
        if buffer is not None and p.grad is not None and p.grad is not buffer:
            p.grad = buffer.copy_(p.grad)
    return loss.detach()


class GraphedMicroStep:
    """`micro_step` as one launch, for models whose kernels are shorter than the host takes to launch them.

    Batches of a new shape run launch by launch a few times, until what a graph must not contain is done (plans are made,
    products timed); then they are captured, and from there on replayed. The first micro-batch of a step, which overwrites
    gradients where others add to them, has a graph of its own; `keep_gradients` has to be called after each step. A pack's
    pieces are filled up with empty ones, and the longest piece counts as a power of two, so that few shapes are there. One
    GPU, without DDP.
    """

    def __init__(self) -> None:
        self._calls: dict[tuple, int] = {}
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Inputs, torch.Tensor]] = {}
        self._pool: Any = None

    def __call__(self, engine: torch.nn.Module, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        longest: int = engine.config.max_positions  # type: ignore
        inputs = _evened(model_inputs(batch, scale.device), longest) | {"scale": scale}
        shape = (engine.settings, *((name, _shape(value)) for name, value in inputs.items()))
        self._calls[shape] = calls = self._calls.get(shape, 0) + 1
        first = all(p.grad is None for p in engine.parameters())
        if calls <= WARMUP or (first and not all(hasattr(p, "grad_buffer") for p in engine.parameters())):
            return _run(engine, inputs)
        if (first, shape) not in self._graphs:
            self._graphs[first, shape] = self._capture(engine, inputs)
        graph, static, loss = self._graphs[first, shape]
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value, non_blocking=True)
        graph.replay()
        if first:
            for p in engine.parameters():
                p.grad = p.grad_buffer  # type: ignore[attr-defined]
        return loss

    def _capture(self, engine: torch.nn.Module, inputs: Inputs) -> tuple:
        static = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = _run(engine, static)
        self._pool = graph.pool()
        return graph, static, loss


def drop_gradients(model: torch.nn.Module) -> None:
    """Gives back what `keep_gradients` kept."""
    for p in model.parameters():
        p.grad = None
        if hasattr(p, "grad_buffer"):
            del p.grad_buffer  # type: ignore[attr-defined]


def keep_gradients(model: torch.nn.Module) -> None:
    """Drops the gradients, but keeps their memory: those of the next step are made in the same place."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad_buffer, p.grad = p.grad, None  # type: ignore[attr-defined]


def choose_micro_step(model: Llama, tokens: int, seq: int, graph: bool | None, world: int) -> MicroStep:
    """For micro-batches of `tokens` tokens. `graph` None: a CUDA graph where it takes longer to launch kernels than to run
    them. Raises ValueError where one is asked for that can't be."""
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    why_not = "a CPU" if device.type != "cuda" else f"{world} processes" if world > 1 else ""
    if dtype == torch.float32 and not why_not:  # whose packed attention waits for the lengths of documents
        why_not = "float32 weights"
    if graph and why_not:
        raise ValueError(
            f"cuda_graph: got true with {why_not}, takes bfloat16 weights on one GPU, or null to choose"
        )
    if graph is None and not why_not:
        peak = devices.peak_flops(device, dtype) or 300e12
        seconds = flops_per_token(model.config, seq) * tokens / (SUSTAINED * peak)
        graph = seconds < HOST_SECONDS * model.config.layers
    return GraphedMicroStep() if graph else micro_step


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


def _evened(inputs: Inputs, longest: int) -> Inputs:
    """With a power of two of pieces, the last ones empty, and the longest piece's length rounded up to one, or to
    `longest`, which no piece is over."""
    if "cu_seqlens" not in inputs:
        return inputs
    borders, tokens = inputs["cu_seqlens"], len(inputs["ids"])
    more = _power_of_two(len(borders) - 1) - (len(borders) - 1)
    longest = min(longest, tokens, _power_of_two(inputs["max_seqlen"]))
    return inputs | {"cu_seqlens": F.pad(borders, (0, more), value=tokens), "max_seqlen": longest}


def _power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()
