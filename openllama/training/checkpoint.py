"""Checkpoints: one folder a step, complete, and either there whole or not at all.

A checkpoint is a model folder (openllama/pretrained.py) with the optimizer's state, the loader's place and the random
states beside the weights. Only safetensors and JSON: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from openllama.config import ModelConfig
from openllama.files import folder_written_aside, read_json, write_json
from openllama.model import Llama
from openllama.optim import AdamW
from openllama.pretrained import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    check_weights,
    open_weights,
    step_folder,
    steps,
    weights,
)

VERSION = 1
OPTIMIZER, RANDOM, STATE = "optimizer.safetensors", "random.safetensors", "state.json"


def save(
    folder: Path,
    step: int,
    model: Llama,
    optimizer: AdamW,
    state: dict[str, Any],
    tokenizer: Path,
    random_states: Sequence[dict[str, torch.Tensor]],
    keep: int = 2,
) -> None:
    """Writes the checkpoint of `step` and removes all but the newest `keep`. For one process of a run.

    Args:
        folder: holds the step folders.
        state: JSON-able: loader position, counters, settings.
        tokenizer: SentencePiece model, copied along so that a checkpoint can be sampled from by itself.
        random_states: `random_state()` of each process.

    Raises:
        OSError: no room or a full disk; the older checkpoints are untouched and nothing half-written stays.
    """
    place = step_folder(folder, step)
    if place.exists():
        return
    for leftover in folder.glob(".step-*"):  # of a run that was killed while it saved
        shutil.rmtree(leftover)
    model_tensors, optimizer_tensors = weights(model), _optimizer_tensors(model, optimizer)
    size = sum(t.nbytes for t in (*model_tensors.values(), *optimizer_tensors.values())) + 2**20
    with folder_written_aside(place, size) as aside:
        model.config.save(aside / CONFIG)
        save_file(model_tensors, aside / WEIGHTS)
        save_file(optimizer_tensors, aside / OPTIMIZER)
        random = {
            f"{rank}/{key}": t for rank, states in enumerate(random_states) for key, t in states.items()
        }
        save_file(random, aside / RANDOM)
        shutil.copyfile(tokenizer, aside / TOKENIZER)
        write_json(aside / STATE, {"version": VERSION, "step": step, **state})
    for old in steps(folder)[:-keep]:
        shutil.rmtree(step_folder(folder, old))


def read_state(place: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises ValueError for another version or a folder that is none."""
    path = place / STATE
    if not path.exists():
        raise ValueError(f"{place}: no {STATE}, so not a checkpoint of a run; takes a step-* folder")
    return read_json(path, VERSION, ("step", "tokens", "loader", "tokenizer", "settings"))


def load(place: Path, model: Llama, optimizer: AdamW, rank: int = 0) -> None:
    """Puts the checkpoint's weights, optimizer state and this process's random state back.

    Raises:
        ValueError: a checkpoint of another shape or optimizer, naming what differs; nothing is changed then.
    """
    check_shape(place / CONFIG, ModelConfig.load(place / CONFIG), model.config)
    own = weights(model)
    with (
        open_weights(place / WEIGHTS) as reader,
        open_weights(place / OPTIMIZER) as moments,
        open_weights(place / RANDOM) as random,  # all are opened before anything is changed
    ):
        saved = {key: random.get_tensor(key) for key in random.keys()}  # noqa: SIM118
        got = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        check_weights(place / WEIGHTS, got, {name: tuple(t.shape) for name, t in own.items()})
        _check_dtypes(place / WEIGHTS, reader, own)
        _check_optimizer(place / OPTIMIZER, moments, model, optimizer)
        for name, value in own.items():  # detached views of the model's own weights
            value.copy_(reader.get_tensor(name))
        kept = set(moments.keys())
        for name, p in _stepped(model, optimizer):
            optimizer.state.pop(p, None)
            if f"{name}/step" not in kept:
                continue
            # One tensor at a time: all of them may not fit into host memory. And copies: on the CPU they would be views of
            # the file, whose room a removed checkpoint then keeps.
            optimizer.state[p] = {
                entry: moments.get_tensor(f"{name}/{entry}").to(
                    "cpu" if entry == "step" else p.device, copy=True
                )
                for entry in optimizer.layout(p)
            }
    if f"{rank}/cpu" in saved:  # a run that goes on with more processes starts the new ones' states afresh
        torch.set_rng_state(saved[f"{rank}/cpu"])
    if f"{rank}/cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved[f"{rank}/cuda"])


def random_state() -> dict[str, torch.Tensor]:
    """This process's random states."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _stepped(model: Llama, optimizer: AdamW) -> list[tuple[str, torch.nn.Parameter]]:
    """The model's parameters that the optimizer has, by name."""
    own = {p for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in model.named_parameters() if p in own]


def _optimizer_tensors(model: Llama, optimizer: AdamW) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name: `layers.0.mlp.w_down.weight/exp_avg`. None of one without a step so far."""
    return {
        # step counts are views of one tensor, which safetensors does not take
        f"{name}/{key}": value.detach().clone() if key == "step" else value.detach().contiguous()
        for name, p in _stepped(model, optimizer)
        for key, value in optimizer.state.get(p, {}).items()
    }


#: safetensors' names of what weights and an optimizer's state are in.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I16": torch.int16,
}


def _dtype(reader: Any, key: str) -> Any:
    name = reader.get_slice(key).get_dtype()
    return _DTYPES.get(name, name)


def _check_dtypes(path: Path, reader: Any, own: dict[str, torch.Tensor]) -> None:
    for name, value in own.items():
        if (got := _dtype(reader, name)) != value.dtype:
            raise ValueError(
                f"{path}: {name}: got {got}, takes {value.dtype}; resume with the dtype it was made with"
            )


def _check_optimizer(path: Path, reader: Any, model: Llama, optimizer: AdamW) -> None:
    got = {key: (tuple(reader.get_slice(key).get_shape()), _dtype(reader, key)) for key in reader.keys()}  # noqa: SIM118
    seen = {key.rpartition("/")[0] for key in got}
    expected = {
        f"{name}/{entry}": what
        for name, p in _stepped(model, optimizer)
        if name in seen
        for entry, what in optimizer.layout(p).items()
    }
    if got == expected:
        return
    wrong = min(key for key in got.keys() | expected.keys() if got.get(key) != expected.get(key))
    raise ValueError(
        f"{path}: {wrong}: got {got.get(wrong, 'none')}, takes {expected.get(wrong, 'none')}; "
        "resume with the model, dtype, moments and masters it was made with"
    )


def check_shape(path: str | Path, saved: ModelConfig, config: ModelConfig) -> None:
    """Raises ValueError naming the first field in which the model at `path` differs from this run's."""
    for field in dataclasses.fields(ModelConfig):
        got, takes = getattr(saved, field.name), getattr(config, field.name)
        if got != takes and field.name != "init_std":
            raise ValueError(
                f"{path}: the model's {field.name} is {got}, this run's {takes}; "
                "give the settings it was made with, or choose another `out`"
            )
