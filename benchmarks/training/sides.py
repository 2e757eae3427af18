"""Who is timed: ours, and what a user would set up today with HuggingFace's Llama. A side is a name and settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Side(NamedTuple):
    """`model` says whose it is, `settings` are the keyword arguments of its builder (ours.py or peers/hf.py)."""

    impl: str
    model: str  # "ours" or "hf"
    settings: dict[str, Any]


def ours(moments: str = "auto", masters: str = "auto", **settings: Any) -> Side:
    """What pre-training runs. "auto": the first form of AdamW that fits (see memory.py)."""
    return Side("ours", "ours", {"moments": moments, "masters": masters, **settings})


PEERS: dict[str, Side] = {
    side.impl: side
    for side in (
        # ours with the optimizer's states as the peers have them: like for like
        Side("ours:bf16-states", "ours", {"moments": "bf16", "masters": "none"}),
        # as little memory as exact masters and fp32 gradients can do with
        Side("ours:lean", "ours", {"moments": "8bit", "masters": "remainder"}),
        # where the original Open-Llama started
        Side("hf:eager", "hf", {"attention": "eager", "optimizer": "foreach", "padding_mask": True}),
        Side("hf:sdpa", "hf", {}),
        # the original's V2
        Side("hf:xformers", "hf", {"attention": "xformers"}),
        Side("hf:flash", "hf", {"attention": "flash"}),
        Side("hf:compile-layers", "hf", {"compiled": "layers"}),
        Side("hf:compile", "hf", {"compiled": "model"}),
        Side("hf:liger", "hf", {"kernels": "liger"}),
        # by layers: of the whole model, Dynamo can't analyse two of Liger's kernels and aborts (torch 2.11, Liger 0.8.5)
        Side("hf:liger+compile", "hf", {"kernels": "liger", "compiled": "layers"}),
        Side("hf:fp8+compile", "hf", {"fp8": True, "compiled": "model"}),
        # HuggingFace's model with our ops in it
        Side("ours:patch", "hf", {"kernels": "ours"}),
    )
}
ON_A_CPU = ("hf:eager", "hf:sdpa")  # of "all": the others are made for GPUs, or compile for minutes


def chosen(names: Sequence[str], on_gpu: bool) -> list[Side]:
    """The peers that `--peers` names, in the table's order. Raises ValueError for a word it doesn't know."""
    unknown = [name for name in names if name not in PEERS and name not in ("all", "none")]
    if unknown:
        raise ValueError(f"--peers: got {unknown[0]!r}, takes all, none, or some of {', '.join(PEERS)}")
    if {"all", "none"} & {*names} and len(names) > 1:
        raise ValueError(f"--peers: got {' '.join(names)}, takes all and none alone")
    if list(names) == ["all"]:
        return [side for impl, side in PEERS.items() if on_gpu or impl in ON_A_CPU]
    return [side for impl, side in PEERS.items() if impl in names]
