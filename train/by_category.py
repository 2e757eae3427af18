"""What a model makes of each category of its held-out text: figures, a table and a picture of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from openllama.data.cache import TokenCache
from openllama.data.loader import Batch, PackedLoader
from openllama.files import file_written_aside
from openllama.training.step import held_out_loss


@dataclass
class Figures:
    """Of one category. Bits per byte compare what tokens can't: languages, which differ in bytes per token."""

    documents: int
    loss: float  # nats per token
    bits_per_byte: float
    bytes_per_token: float


def measure(
    loss: Callable[[Batch], torch.Tensor], sources: Mapping[str, TokenCache], context: int, batch: int
) -> dict[str, Figures]:
    """The figures of each category, those of one name in several sources together; `loss` sums a batch's nats."""
    categories = list(dict.fromkeys(c for cache in sources.values() for c in cache.categories))
    figures = {}
    for category in categories:
        alone = {c: float(c == category) for c in categories}
        loader = PackedLoader(sources, context, batch, mix=alone)
        lengths = [n for cache in sources.values() for n in _lengths(cache, category)]
        text_bytes = sum(cache.categories.get(category, 0) for cache in sources.values())
        nats = held_out_loss(loss, loader.one_epoch())
        figures[category] = Figures(
            documents=len(lengths),
            loss=nats,
            bits_per_byte=nats * loader.targets_per_epoch / text_bytes / math.log(2),
            bytes_per_token=text_bytes / (sum(lengths) - 2 * len(lengths)),  # bos and eos stand for no text
        )
    return figures


def _lengths(cache: TokenCache, category: str) -> list[int]:
    """Tokens of each document of a category."""
    if category not in cache.categories:
        return []
    return cache.lengths[cache.category_of == list(cache.categories).index(category)].tolist()


def table(figures: Mapping[str, Figures]) -> str:
    """Names come last: their characters may be twice as wide as others."""
    lines = [f"{'documents':>9} {'nats/token':>10} {'bits/byte':>9} {'bytes/token':>11}  category"]
    for category, f in figures.items():
        lines.append(
            f"{f.documents:>9,} {f.loss:>10.4f} {f.bits_per_byte:>9.3f} {f.bytes_per_token:>11.3f}  "
            f"{category or '(none)'}"
        )
    return "\n".join(lines)


def plot(figures: Mapping[str, Figures], picture: Path) -> None:
    """Bars of bits per byte and of bytes per token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    bars = {
        "held out, bits/byte (fewer: predicted better)": [f.bits_per_byte for f in figures.values()],
        "held out, bytes/token (more: fewer tokens)": [f.bytes_per_token for f in figures.values()],
    }
    for panel, (label, values) in zip(panels, bars.items()):
        panel.bar_label(panel.bar(list(figures), values), fmt="%.2f")
        panel.set_ylabel(label)
    with file_written_aside(picture) as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)
