"""Checkpoints: one folder a step, complete, and either there whole or not at all.

A checkpoint is written into a hidden folder beside its place, flushed to disk, then renamed: whoever kills the run in
between finds the one before. Only safetensors and JSON: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from openllama.config import ModelConfig
from openllama.model import Llama
from openllama.training.faults import check_room, removed_on_failure

VERSION = 1


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint in `folder`, in order."""
    names = (re.fullmatch(r"step-(\d{8})", p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(m[1]) for m in names if m)


def weights(model: Llama) -> dict[str, torch.Tensor]:
    """The state dict with a tied head stored once, as the embedding."""
    state = model.state_dict()
    if model.config.tied:
        del state["head.weight"]
    return {name: value.detach().contiguous() for name, value in state.items()}


def optimizer_tensors(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name: `layers.0.mlp.w_down.weight/exp_avg`."""
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
    }


def save(
    folder: Path,
    step: int,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    tokenizer: Path,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
    keep: int = 2,
) -> Path:
    """Writes the checkpoint of `step` and removes all but the newest `keep`.

    Args:
        folder: holds the step folders.
        state: JSON-able: loader position, counters, settings.
        tokenizer: SentencePiece model, copied along so that a checkpoint can be sampled from by itself.
        rank, barrier: every process calls this; rank 0 writes the model, each its own random state.

    Raises:
        OSError: no room or a full disk; the older checkpoints are untouched and nothing half-written stays.
    """
    place, aside = step_folder(folder, step), folder / f".step-{step:08d}.writing"
    if place.exists():
        return place
    model_tensors, state_tensors = weights(model), optimizer_tensors(model, optimizer)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.writing"):  # of a run that was killed while it saved
            shutil.rmtree(leftover)
        check_room(folder, sum(t.nbytes for t in (*model_tensors.values(), *state_tensors.values())) + 2**20)
        aside.mkdir()
    barrier()
    with removed_on_failure(aside):
        save_file(_random_state(), aside / f"random-{rank:05d}.safetensors")
        if rank == 0:
            model.config.save(aside / "config.json")
            save_file(model_tensors, aside / "model.safetensors")
            save_file(state_tensors, aside / "optimizer.safetensors")
            shutil.copyfile(tokenizer, aside / "tokenizer.model")
            (aside / "state.json").write_text(json.dumps({"version": VERSION, "step": step, **state}, indent=2) + "\n")
        for path in aside.iterdir():
            _flush(path)
        barrier()
        if rank == 0:
            _flush(aside)
            os.rename(aside, place)
            _flush(folder)
    if rank == 0:
        for old in steps(folder)[:-keep]:
            shutil.rmtree(step_folder(folder, old))
    barrier()
    return place


def read_state(place: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises ValueError for another version or a folder that is none."""
    path = place / "state.json"
    if not path.exists():
        raise ValueError(f"{place}: no state.json, so not a checkpoint of this project; takes a step-* folder")
    state = json.loads(path.read_text())
    if state.get("version") != VERSION:
        raise ValueError(f"{path}: got checkpoint version {state.get('version')!r}, takes {VERSION}")
    return state


def load(place: Path, model: Llama, optimizer: torch.optim.Optimizer, rank: int = 0) -> dict[str, Any]:
    """Puts the checkpoint's weights, optimizer state and random state back; returns its state.json.

    Raises:
        ValueError: a checkpoint of another shape, naming the first field that differs; nothing is changed then.
    """
    state = read_state(place)
    _check_shape(place / "config.json", model.config)
    load_weights(model, place / "model.safetensors")
    saved = load_file(place / "optimizer.safetensors")
    for name, p in model.named_parameters():
        entries = {key.rpartition("/")[2]: value for key, value in saved.items() if key.rpartition("/")[0] == name}
        optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in entries.items()}
    random = place / f"random-{rank:05d}.safetensors"
    if random.exists():  # a run that goes on with more processes starts the new ones' states afresh
        _set_random_state(load_file(random))
    return state


def load_weights(model: Llama, path: Path) -> None:
    """Copies the weights of `path` into `model`, in the model's dtype. Raises ValueError naming what doesn't fit."""
    own = weights(model)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        if names != set(own):
            missing, extra = sorted(set(own) - names), sorted(names - set(own))
            raise ValueError(f"{path}: not this model's weights: missing {missing[:3]}, unexpected {extra[:3]}")
        for name, value in own.items():
            if (shape := tuple(file.get_slice(name).get_shape())) != tuple(value.shape):
                raise ValueError(f"{path}: {name}: got shape {shape}, takes {tuple(value.shape)}")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(file.get_tensor(name))


def _check_shape(path: Path, config: ModelConfig) -> None:
    saved = ModelConfig.load(path)
    for field in dataclasses.fields(ModelConfig):
        got, takes = getattr(saved, field.name), getattr(config, field.name)
        if got != takes and field.name != "init_std":
            raise ValueError(
                f"{path}: the checkpoint's {field.name} is {got}, this run's {takes}; "
                "resume with the settings it was made with, or choose another `out`"
            )


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
