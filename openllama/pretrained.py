"""Model folders: config.json, model.safetensors and, where it is known, tokenizer.model.

A step of a training run is such a folder with more in it. safetensors only: no pickle is ever loaded.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from openllama.config import ModelConfig
from openllama.files import folder_written_aside
from openllama.model import Llama

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"


def save_model(model: Llama, folder: str | Path, tokenizer_model: str | Path | None = None) -> Path:
    """Writes `model` to a new `folder` that `load_model` reads, whole or not at all.

    A tied head is stored once, as `embed.weight`. Raises FileExistsError where the folder holds something, OSError where
    the disk is full.
    """
    tensors = weights(model)
    with folder_written_aside(folder, sum(t.nbytes for t in tensors.values()) + 2**20) as aside:
        model.config.save(aside / CONFIG)
        save_file(tensors, aside / WEIGHTS)
        if tokenizer_model is not None:
            shutil.copyfile(tokenizer_model, aside / TOKENIZER)
    return Path(folder)


def step_folder(folder: Path, step: int) -> Path:
    """Where a run keeps the model of `step`."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps that have a `step_folder` in `folder`, in order."""
    names = (p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ()
    found = (re.fullmatch(r"step-(\d{8}|[1-9]\d{8,})", name) for name in names)
    return sorted(int(m[1]) for m in found if m)


def weights(model: Llama) -> dict[str, torch.Tensor]:
    """The state dict, detached, with a tied head stored once, as the embedding."""
    state = model.state_dict()
    if model.config.tied:
        del state["head.weight"]
    return {name: value.detach().contiguous() for name, value in state.items()}


def empty_model(config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> Llama:
    """A model whose weights hold nothing yet: for filling, without the time that an initialisation takes."""
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tied:  # to_empty gives each module a weight of its own
        model.head.weight = model.embed.weight
    return model


def check_weights(
    source: str | Path, got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError naming the weights that are missing, unexpected or of another shape."""
    problems = []
    for word, names in (
        ("missing", expected.keys() - got.keys()),
        ("unexpected", got.keys() - expected.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            problems.append(f"{word} {shown}")
    for name in sorted(expected.keys() & got.keys()):
        if tuple(got[name]) != tuple(expected[name]):
            problems.append(f"{name} has shape {tuple(got[name])}, takes {tuple(expected[name])}")
    if problems:
        raise ValueError(
            f"{source}: not the weights that its config.json describes: {'; '.join(problems[:4])}"
        )


def open_weights(path: Path) -> Any:
    """safetensors' reader of `path`, as a context. Raises FileNotFoundError, or ValueError for a damaged file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the folder is not complete, copy or save it again")
    try:
        return safe_open(path, "pt")
    except Exception as e:  # safetensors has its own exception for a bad header
        raise ValueError(f"{path}: not a whole safetensors file ({e}); copy or save it again") from None


def stored_dtype(reader: Any, names: list[str]) -> torch.dtype:
    """The dtype that holds all of these tensors without loss."""
    dtypes = {reader.get_slice(name).get_dtype() for name in names}
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    for dtype in dtypes - known.keys():
        raise ValueError(f"weights: got {dtype} (a quantised model?), takes F32, BF16, F16 or F64")
    widest = known[dtypes.pop()]
    for dtype in dtypes:
        widest = torch.promote_types(widest, known[dtype])
    return widest


def read_model(folder: Path, dtype: torch.dtype | None, device: torch.device | str) -> Llama:
    """The model of a folder that `save_model` or a training run wrote. Raises ValueError naming what doesn't fit."""
    config = ModelConfig.load(folder / CONFIG)
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in weights(Llama(config)).items()}
    with open_weights(folder / WEIGHTS) as reader:
        names = list(reader.keys())
        check_weights(folder / WEIGHTS, {n: tuple(reader.get_slice(n).get_shape()) for n in names}, expected)
        model = empty_model(config, dtype or stored_dtype(reader, names), device)
        for name, value in weights(model).items():  # detached views of the model's own weights
            value.copy_(reader.get_tensor(name))
    return model
