"""Part of some shard folders, for training a tokenizer: chosen by shards, by bytes and by category."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from .documents import Document
from .prepare import fraction
from .shards import read_manifest, read_shards


def sample(
    folders: Mapping[str, int | None] | Mapping[Path, int | None],
    max_bytes: int,
    weights: Mapping[str, float] | None = None,
) -> Iterator[Document]:
    """About `max_bytes` of text, chosen by its hash: spread evenly, and the same every time.

    Args:
        folders: shard folders, each with the number of its shards to read, spread over it; None: all.
        weights: how many times more of a category to take than of the others (1): 0.5 takes half as much, 0 none.

    Raises:
        ValueError: a category that no shard has, a number of shards that a folder doesn't have.
    """
    weights = weights or {}
    chosen = {folder: _shards(folder, count) for folder, count in folders.items()}
    weighted, known = 0.0, set()
    for entries in chosen.values():
        for category, counts in ((c, n) for entry in entries for c, n in entry["categories"].items()):
            known.add(category)
            weighted += counts["text_bytes"] * weights.get(category, 1)
    for category, weight in weights.items():
        if category not in known:
            raise ValueError(f"weights: got {category!r}, takes {', '.join(sorted(known))}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weights: got {weight} for {category}, takes a number of at least 0")
    if not weighted:
        raise ValueError("weights: leave no text to take; give some category a weight above 0")
    share = max_bytes / weighted
    return (
        document
        for folder, entries in chosen.items()
        for document in read_shards(folder, [entry["name"] for entry in entries])
        if (wanted := share * weights.get(document["meta"]["category"], 1)) >= 1
        or fraction(document["text"], "sample") < wanted
    )


def _shards(folder: str | Path, count: int | None) -> list[dict]:
    entries = read_manifest(folder)["shards"]
    if count is None:
        return entries
    if not 1 <= count <= len(entries):
        raise ValueError(f"{folder}: got {count} shards to read, takes 1 to its {len(entries)}")
    return [entries[i * len(entries) // count] for i in range(count)]
