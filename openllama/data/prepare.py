"""A source of text to training and held-out shards: parts of it made side by side, then joined.

All is written in `.unfinished` first. What is complete there is noted, so that a run that was interrupted goes on to the
same bytes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openllama.files import goes_on_after_full_disk, read_json, sole_writer, write_json

from .documents import Damage, DamagedData, Fields
from .join import join
from .journal import JOURNAL, TRAIN, VALID
from .pool import ordered_map, process_count
from .progress import shared_bar
from .shards import LINES_PER_SHARD, MANIFEST, differences, reusable
from .sources import PYTHON, FileSource, Source, open_source
from .unit import Made, Options, Unit, make

UNFINISHED = ".unfinished"  # shards are made there and renamed when all are complete
BEGUN = "begun.json"  # in it: the settings, and what the source consists of
# Of the source: a process takes as long to start as it needs for about this much.
BYTES_PER_PROCESS = 32 << 20
VERSION = 2  # of what lies in the unfinished folder


class Corpus(NamedTuple):
    """A published data set: its keys, and how many lines Open-Llama's preparation made of the whole of it."""

    fields: Fields
    lines: int
    fewer: str = ""  # why a whole download may hold less


CORPORA = {
    "pile": Corpus(
        Fields(("text",), "meta.pile_set_name"),
        210_607_728,
        "monology/pile-uncopyrighted, from which train/download_pile.sh takes it, is the Pile without Books3 and other parts",
    ),
    "wudao": Corpus(Fields(("title", "content"), "dataType"), 59_132_213),
}


def prepare(
    source: str | Path,
    out: str | Path,
    max_bytes: int | None = None,
    valid_share: float = 0.02,
    *,
    fields: Fields = Fields(),  # noqa: B008 frozen
    on_damage: str = "skip",
    lines_per_shard: int = LINES_PER_SHARD,
    processes: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes `out`/train and, unless `valid_share` is 0, `out`/valid; returns what was made.

    Takes documents in order up to the first that would exceed `max_bytes` of UTF-8 text. A document is held
    out if the hash of its text falls below `valid_share`. Shards made before with equal settings are reused,
    unfinished ones completed; others raise. The result does not depend on `processes` (default: one per core, fewer
    for a small source).

    Args:
        source: see `sources.open_source`.
        fields: the keys of text and category in a record.
        on_damage: "skip" counts what cannot be used, with examples, in the manifest; "raise" stops at the first.

    Returns:
        {"reused", "train", "valid" (manifests; valid is None at share 0), "documents", "text_bytes", "passed_over" (files
        of the source by why), "rate" (bytes of text a second of this run; None where nothing was left to do)}.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes: got {max_bytes}, takes a whole number of at least 1, or None for all")
    if not 0 <= valid_share < 1:
        raise ValueError(f"valid_share: got {valid_share}, takes a number from 0 to below 1")
    if lines_per_shard < 1:
        raise ValueError(f"lines_per_shard: got {lines_per_shard}, takes a whole number of at least 1")
    Damage(on_damage)  # raises where it is neither
    opened, out = open_source(source, fields), Path(out)
    if isinstance(opened, FileSource) and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(
            f"out: {out} lies in the source {source}, where a later run would read it as text; name another folder"
        )
    settings = {
        "source": opened.name,
        "source_bytes": opened.size,
        "source_fingerprint": opened.fingerprint,
        "text_keys": list(fields.text),
        "category_key": fields.category,
        "max_bytes": max_bytes,
        "valid_share": valid_share,
        # Python ships files that can't be decoded
        "on_damage": "skip" if opened.name == PYTHON else on_damage,
        "lines_per_shard": lines_per_shard,
    }
    splits = [TRAIN, VALID] if valid_share else [TRAIN]
    options = Options(fields, splits, max_bytes, valid_share, settings["on_damage"], lines_per_shard)
    rate = None
    # without a lock, which could not be had in a folder that may only be read
    manifests = {} if (out / UNFINISHED).exists() else _complete(out, splits, settings)
    if not manifests:
        processes = process_count(processes, opened.size or 0, BYTES_PER_PROCESS)
        with sole_writer(out), goes_on_after_full_disk(out):
            rate = _write(opened, out, settings, options, processes, progress)
            manifests = _complete(out, splits, settings)
    made = list(manifests.values())
    return {
        "reused": rate is None,
        "train": manifests[TRAIN],
        "valid": manifests.get(VALID),
        "documents": sum(m["lines"] for m in made),
        "text_bytes": sum(m["text_bytes"] for m in made),
        "passed_over": dict(opened.passed_over),
        "rate": rate,
    }


def _complete(out: Path, splits: list[str], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifests, once each split is complete: what still lies in the unfinished folder then takes its place."""
    found = {}
    for split in splits:
        aside = out / UNFINISHED / split
        place = aside if (aside / MANIFEST).exists() else out / split
        found[split] = place, reusable(place, settings | {"split": split})
    if not all(manifest for _, manifest in found.values()):
        return {}
    for split, (place, _) in found.items():
        if place != out / split:
            # empty, else `reusable` would have found or refused it
            shutil.rmtree(out / split, ignore_errors=True)
            os.replace(place, out / split)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return {split: manifest for split, (_, manifest) in found.items() if manifest}


def _write(
    source: Source, out: Path, settings: dict[str, Any], options: Options, processes: int, progress: bool
) -> float | None:
    """Bytes of text a second; None where another run has just finished, or was interrupted at its very end."""
    folder, limit = out / UNFINISHED, options.max_bytes
    _begin(folder, settings, source.listing())
    sources = [source] if limit else source.units()  # where a limit cuts off is only known in order
    units = [Unit(i, part, folder / f"unit-{i:05d}") for i, part in enumerate(sources)]
    start = time.perf_counter()
    try:
        if _complete(out, options.splits, settings):
            return None
        with shared_bar(f"reading {source.name}", limit or source.size, len(units), progress) as read:
            made = list(ordered_map(make, units, min(processes, len(units)), (options, read)))
    except BaseException as e:
        # what cannot be used again: with the source repaired, or on_damage changed, it is another run
        if isinstance(e, DamagedData) or not any(folder.glob(f"*/{JOURNAL}")):
            shutil.rmtree(folder)
        raise
    _check_not_empty(source, out, made, options)
    join(folder, settings, options, units, made, _damage(made), processes)
    return sum(m.counts["text_bytes"] - m.before for m in made) / (time.perf_counter() - start)


def _begin(folder: Path, settings: dict[str, Any], listing: str | None) -> None:
    """Notes what is being made, or checks that an interrupted run made the same."""
    now = {"version": VERSION, "settings": settings, "listing": listing}
    if not (folder / BEGUN).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_json(folder / BEGUN, now)
        return
    begun = read_json(folder / BEGUN)
    if begun.get("version") != VERSION:
        raise ValueError(f"{folder}: an interrupted run of another release; remove the folder")
    if what := differences(begun["settings"], settings):
        raise ValueError(
            f"{folder}: an interrupted run had other settings ({what}); go on with those, or remove the folder"
        )
    if begun != now:
        raise ValueError(
            f"{folder}: the files of {settings['source']} are others than when the run was interrupted; remove the "
            "folder to start anew"
        )


def _check_not_empty(source: Source, out: Path, made: Sequence[Made], options: Options) -> None:
    documents, damage = sum(m.counts["documents"] for m in made), _damage(made)
    if not documents:
        skipped = ", ".join(f"{n:,} x {reason}" for reason, n in sorted(damage.counts.items()))
        what = (
            f"{source.name}: no document was taken of it (skipped: {skipped or 'none'}); give a source with text, other "
            "keys, or a larger max_bytes"
        )
    elif empty := [split for split in options.splits if not any(m.shards[split] for m in made)]:
        what = (
            f"{out / empty[0]}: none of the source's {documents:,} documents fell into it at valid_share="
            f"{options.valid_share} (a document is chosen by its hash); give more documents, another valid_share, or 0 "
            "to hold out none"
        )
    else:
        return
    shutil.rmtree(out / UNFINISHED)
    raise ValueError(what)


def _damage(made: Sequence[Made]) -> Damage:
    total = Damage()
    for m in made:
        total.add(**m.counts["damage"])
    return total
