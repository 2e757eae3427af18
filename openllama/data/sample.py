"""Part of some shard folders, for training a tokenizer: chosen by shards, by bytes and by category."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .documents import Document
from .progress import bar
from .shards import read_manifest, read_shard
from .unit import fraction

LEAST_SHARDS = 64  # of a folder, which may be in the order of its files or categories
STOCK = 4  # times the bytes wanted are read: a sample of all that lies in a few shards would be of neighbours
# That are counted one by one; more are no kinds of text but, for example, names of files.
COUNTED_CATEGORIES = 256
OTHERS = "\0"  # stands for all categories of a folder that has more
GOLDEN = (5**0.5 - 1) / 2  # the i for which i * GOLDEN % 1 is smallest lie evenly over any range
HELD_OUT_BYTES, HELD_OUT_SHARE = 20_000_000, 0.05


class _Part(NamedTuple):
    """What is read of a folder."""

    folder: Path
    shards: Sequence[dict[str, Any]]  # their entries in the manifest
    taken: Mapping[str, float]  # share of each category's documents
    held_out: Mapping[str, float]


def sample(
    folders: Mapping[str, int | None] | Mapping[Path, int | None],
    max_bytes: int,
    weights: Mapping[str, float] | None = None,
    held_out: list[Document] | None = None,
    *,
    progress: bool = True,
) -> Iterator[Document]:
    """About `max_bytes` of text, chosen by its hash: spread evenly, and the same every time.

    Of a folder are read at least LEAST_SHARDS shards, evenly spread, and by the counts in its manifest so many that
    they hold STOCK times the bytes wanted of every category, or all there are of it (of more than COUNTED_CATEGORIES: of
    those with a weight, and of the others together). A category has the share of the sample that the whole folder and
    its weight give it, whatever share of those shards it is.

    Args:
        folders: shard folders; a number with one means that exactly so many of its shards, evenly spread, are read,
            and stand for the folder.
        weights: how many times more of a category to take than of the others (1): 0.5 takes half as much, 0 none.
        held_out: given a list, adds documents that are not in the sample, to measure on: about HELD_OUT_BYTES of all
            categories, at most HELD_OUT_SHARE of what is read. All are there once the sample is read.

    Raises:
        ValueError: a category that no shard has, a number of shards that a folder doesn't have.
        DamagedData: on the way, naming file and line.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes: got {max_bytes}, takes a whole number of at least 1")
    weights = weights or {}
    offered = {folder: _offered(folder, count) for folder, count in folders.items()}
    text = sum((_text_bytes(entries) for entries in offered.values()), Counter())
    _check(weights, text)
    share = max_bytes / sum(size * weights.get(category, 1) for category, size in text.items())
    kept = HELD_OUT_BYTES / text.total() if held_out is not None else 0
    parts = [
        _part(folder, offered[folder], count is not None, weights, share, kept)
        for folder, count in folders.items()
    ]
    return _read(parts, [] if held_out is None else held_out, progress)


def _offered(folder: str | Path, count: int | None) -> list[dict[str, Any]]:
    entries = read_manifest(folder)["shards"]
    if count is None:
        return entries
    if not 1 <= count <= len(entries):
        raise ValueError(f"{folder}: got {count} shards to read, takes 1 to its {len(entries)}")
    return [entries[i * len(entries) // count] for i in range(count)]


def _check(weights: Mapping[str, float], text: Mapping[str, int]) -> None:
    for category, weight in weights.items():
        if category not in text:
            raise ValueError(f"weights: got {category!r}, takes {', '.join(sorted(text))}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weights: got {weight} for {category}, takes a number of at least 0")
    if not any(weights.get(category, 1) for category in text):
        raise ValueError("weights: leave no text to take; give some category a weight above 0")


def _part(
    folder: str | Path,
    offered: Sequence[dict[str, Any]],
    exactly: bool,
    weights: Mapping[str, float],
    share: float,
    kept: float,
) -> _Part:
    """`share` of the folder's documents (of weight 1), and of the rest as many as are `kept`."""
    apart = _text_bytes(offered)
    if len(apart) > COUNTED_CATEGORIES:
        apart = weights
    text = _text_bytes(offered, apart)
    wanted = {category: size * share * weights.get(category, 1) for category, size in text.items()}
    read = offered if exactly else _enough(offered, apart, wanted)
    found = _text_bytes(read, apart)
    return _Part(
        Path(folder),
        read,
        {category: wanted[category] / size for category, size in found.items()},
        {category: min(HELD_OUT_SHARE, kept * text[category] / size) for category, size in found.items()},
    )


def _enough(
    offered: Sequence[dict[str, Any]], apart: Container[str], wanted: Mapping[str, float]
) -> list[dict[str, Any]]:
    """LEAST_SHARDS shards, evenly spread, and as many more as hold a category of which there is too little yet."""
    read, found = [], Counter()
    for i in sorted(range(len(offered)), key=lambda i: i * GOLDEN % 1):
        text = _text_bytes([offered[i]], apart)
        if len(read) < LEAST_SHARDS or any(found[category] < STOCK * wanted[category] for category in text):
            read.append(i)
            found += text
    return [offered[i] for i in sorted(read)]


def _text_bytes(entries: Iterable[dict[str, Any]], apart: Container[str] | None = None) -> Counter[str]:
    """Of each category, in some shards; those not in `apart`, where it is given, are OTHERS."""
    found: Counter[str] = Counter()
    for entry in entries:
        for category, counts in entry["categories"].items():
            found[category if apart is None or category in apart else OTHERS] += counts["text_bytes"]
    return found


def _read(parts: Sequence[_Part], held_out: list[Document], progress: bool) -> Iterator[Document]:
    size = sum(entry["bytes"] for part in parts for entry in part.shards)
    with bar("reading", size, progress) as advance:
        for part in parts:
            for document in (d for entry in part.shards for d in read_shard(part.folder, entry, advance)):
                category = document["meta"]["category"]
                category = category if category in part.taken else OTHERS
                place = fraction(document["text"], "sample")
                if place >= 1 - part.held_out[category]:
                    held_out.append(document)
                elif place < part.taken[category]:
                    yield document
