"""Token caches packed for a run: documents of one weight share packs, and files keep them, for all processes at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openllama.config import nearest
from openllama.files import folder_written_aside, read_json, sole_writer, write_json

from .cache import TokenCache
from .pack import Packs, pack

VERSION = 1
INDEX = "packs.json"


class Group(NamedTuple):
    """Packs in a row, of documents of one weight."""

    weight: Fraction  # how often an epoch takes them
    first: int
    count: int
    targets: int  # labels in them


class Packed(NamedTuple):
    packs: Packs
    groups: list[Group]


def pack_sources(
    sources: Mapping[str, TokenCache],
    context: int,
    mix: Mapping[str, float],
    long: str,
    keep: str | Path | None = None,
) -> Packed:
    """Packs the documents of all `sources`, tokens counted over their files in a row.

    `keep`: a folder that takes the packs, which are then read by memory map; what it holds of the same sources and
    settings is opened, anything else that it kept is replaced. Otherwise as `loader.PackedLoader`.
    """
    check_mix(mix, {name: cache.categories for name, cache in sources.items()})
    if keep is None:
        return _pack_groups(sources, context, mix, long)
    made_from = {
        "sources": [[name, cache.fingerprint] for name, cache in sources.items()],
        "context": context,
        "mix": dict(mix),
        "long": long,
    }
    keep = Path(keep)
    if found := _open(keep, made_from):
        return found
    with sole_writer(keep.parent):
        if not (found := _open(keep, made_from)):  # by a run that has just ended
            _write(keep, _pack_groups(sources, context, mix, long), made_from)
            found = _open(keep, made_from)
    if not found:
        raise OSError(f"{keep}: cannot be read, though just written; check the disk")
    return found


def _pack_groups(
    sources: Mapping[str, TokenCache], context: int, mix: Mapping[str, float], long: str
) -> Packed:
    made: list[Packs] = []
    groups: list[Group] = []
    pieces = packs = 0
    for weight, start, tokens in _by_weight(sources, mix):
        group = pack(start, tokens, context, long)
        count = len(group.first) - 1
        groups.append(Group(weight, packs, count, int(group.length.sum())))
        made.append(group._replace(first=group.first[bool(made) :] + pieces))
        pieces, packs = pieces + len(group.length), packs + count
    return Packed(Packs(*map(_joined, zip(*made))), groups)


def _by_weight(
    sources: Mapping[str, TokenCache], mix: Mapping[str, float]
) -> Iterator[tuple[Fraction, np.ndarray, np.ndarray]]:
    """(weight, start, tokens) of the documents of each weight."""
    weights = [[weight_of(mix, name, c) for c in cache.categories] for name, cache in sources.items()]
    bases = np.cumsum([0, *(cache.tokens for cache in sources.values())]).tolist()
    values = sorted({weight for of_source in weights for weight in of_source})
    numbers = {value: i for i, value in enumerate(values)}
    by_category = [np.array([numbers[weight] for weight in of_source], np.int32) for of_source in weights]
    for value in filter(None, values):  # what has the weight 0 is not packed
        starts, lengths = [], []
        for cache, base, of_category in zip(sources.values(), bases, by_category):
            start, tokens = cache.offsets[:-1].view(np.int64), cache.lengths
            if len(values) > 1:
                chosen = of_category[cache.category_of] == numbers[value]
                start, tokens = start[chosen], tokens[chosen]
            starts.append(start + base if base else start)  # a large corpus of one source is not copied
            lengths.append(tokens)
        yield value, _joined(starts), _joined(lengths)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# ---------------------------------------------------------------- weights


def weight_of(mix: Mapping[str, float], source: str, category: str) -> Fraction:
    """A category of one source comes before one of any, before the whole source. Exact: 0.29 of 100 packs are 29."""
    found = mix.get(f"{source}/{category}", mix.get(category, mix.get(source, 1)))
    return Fraction(str(found))


def check_mix(mix: Mapping[str, float], categories: Mapping[str, Iterable[str]]) -> None:
    """Raises ValueError for a weight or a name that no source (`categories` by its name) has, or if all are 0."""
    known = {key for source, of_source in categories.items() for key in _names(source, of_source)}
    for key, weight in mix.items():
        if key not in known:
            raise ValueError(f"mix: got {key!r}, no source or category{nearest(key, known)}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1000:
            raise ValueError(f"mix: got {weight!r} for {key}, takes a number from 0 to 1000")
    if not any(weight_of(mix, source, c) for source, of_source in categories.items() for c in of_source):
        raise ValueError(f"mix: got {dict(mix)}, of which an epoch takes none; give a weight above 0")


def _names(source: str, categories: Iterable[str]) -> Iterator[str]:
    if source:
        yield source
    for category in categories:
        yield from (category, f"{source}/{category}") if source else (category,)


# ---------------------------------------------------------------- files


_DTYPES = {"source": np.int64, "length": np.int32, "slack": np.int64, "first": np.int64}


def _write(folder: Path, packed: Packed, made_from: dict[str, Any]) -> None:
    size = sum(array.nbytes for array in packed.packs)
    with folder_written_aside(folder, size, _replaceable) as aside:
        for name, array in packed.packs._asdict().items():
            with (aside / f"{name}.bin").open("wb") as file:
                file.write(np.ascontiguousarray(array).data)
        groups = [[str(g.weight), *g[1:]] for g in packed.groups]
        write_json(aside / INDEX, {"version": VERSION, "made_from": made_from, "groups": groups})


def _replaceable(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= {INDEX, *(f"{name}.bin" for name in _DTYPES)}


def _open(folder: Path, made_from: dict[str, Any]) -> Packed | None:
    """The packs in `folder`; None where they were made from something else, or are damaged: they can be made again."""
    try:
        index = read_json(folder / INDEX, VERSION, ("made_from", "groups"))
        groups = [Group(Fraction(weight), *map(int, counts)) for weight, *counts in index["groups"]]
        packs = Packs(**{name: _mapped(folder / f"{name}.bin", dtype) for name, dtype in _DTYPES.items()})
    except (OSError, ValueError, TypeError):
        return None
    pieces, count = len(packs.length), sum(group.count for group in groups)
    whole = (
        len(packs.source) == pieces
        and len(packs.slack) in (0, pieces)
        and len(packs.first) == count + 1
        and packs.first[-1] == pieces
    )
    return Packed(packs, groups) if whole and index["made_from"] == made_from else None


def _mapped(path: Path, dtype: type) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)
