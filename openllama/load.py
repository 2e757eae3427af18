"""A model for use, from whichever folder a user has."""

from __future__ import annotations

from pathlib import Path

import torch

from openllama.files import read_json
from openllama.hf import import_hf
from openllama.model import Llama
from openllama.pretrained import CONFIG, TOKENIZER, read_model, step_folder, steps


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Llama, Path | None]:
    """A model for use, from whichever folder a user has.

    Args:
        path: a step folder of a run, a folder of such (the highest step is taken), a folder of `save_model`, or a
            HuggingFace folder.
        dtype: of the weights; None: as stored.
        device: where they go.

    Returns:
        The model and its tokenizer.model (None where there is none).

    Raises:
        FileNotFoundError: no model there. ValueError: a model of another shape or kind, naming what doesn't fit.
    """
    folder = find_model(path)
    if "architectures" in read_json(folder / CONFIG):
        model = import_hf(folder, dtype, device)
    else:
        model = read_model(folder, dtype, device)
    tokenizer = folder / TOKENIZER
    return model, tokenizer if tokenizer.is_file() else None


def find_model(path: str | Path) -> Path:
    """`path` itself where it holds a model, else the highest step folder in it. Raises FileNotFoundError."""
    path = Path(path)
    if (path / CONFIG).is_file():
        return path
    found = steps(path)
    if not found:
        what = "no config.json and no step-* folder in it" if path.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{path}: {what}; takes a checkpoint (runs/NAME/checkpoints or a step-* folder in it) or a HuggingFace folder"
        )
    return step_folder(path, found[-1])
