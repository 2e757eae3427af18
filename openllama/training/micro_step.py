"""Forward and backward of one micro-batch, launch by launch or as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from openllama.data.loader import Batch

Inputs = dict[str, Any]  # of the model's forward


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
    loss = engine(**model_inputs(batch, scale.device), scale=scale)
    loss.backward()
    return loss.detach()


class GraphedMicroStep:
    """`micro_step` as one launch, for models whose kernels are shorter than the host takes to launch them.

    Batches of a new shape run launch by launch once, which warms up what a graph must not contain; the second of that
    shape is captured, and from then on they are replayed. Gradients have to stay where they are: zero them between
    steps, don't drop them. A pack's pieces are filled up with empty ones, and the longest piece counts as a power of
    two, so that few shapes are there. One GPU, without DDP.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Inputs, torch.Tensor] | None] = {}
        self._pool: Any = None

    def __call__(self, engine: torch.nn.Module, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        inputs = _evened(model_inputs(batch, scale.device)) | {"scale": scale}
        key = tuple((name, _shape(value)) for name, value in inputs.items())
        if key not in self._graphs:
            self._graphs[key] = None
            return micro_step(engine, batch, scale)
        if self._graphs[key] is None:
            self._graphs[key] = self._capture(engine, inputs)
        graph, static, loss = self._graphs[key]  # type: ignore[misc]
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value, non_blocking=True)
        graph.replay()
        return loss

    def _capture(self, engine: torch.nn.Module, inputs: Inputs) -> tuple:
        static = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = engine(**static)
            loss.backward()
        self._pool = graph.pool()
        return graph, static, loss.detach()


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


def _evened(inputs: Inputs) -> Inputs:
    """With a power of two of pieces, the last ones empty, and the longest piece's length rounded up to one."""
    if "cu_seqlens" not in inputs:
        return inputs
    borders, tokens = inputs["cu_seqlens"], len(inputs["ids"])
    more = _power_of_two(len(borders) - 1) - (len(borders) - 1)
    longest = min(tokens, _power_of_two(inputs["max_seqlen"]))
    return inputs | {"cu_seqlens": F.pad(borders, (0, more), value=tokens), "max_seqlen": longest}


def _power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()
