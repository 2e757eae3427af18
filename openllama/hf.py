"""Weights to and from HuggingFace's LlamaForCausalLM: local folders, safetensors, both ways.

Our fused weights are theirs one below the other (wqkv = q, k, v; w_gate_up = gate, up), and both use the half-split
rotary layout, so that nothing is permuted and the round trip is exact to the bit.

HuggingFace's Llama has no stable embedding (Open-Llama's LayerNorm after the embedding). Since that norm sees one row
of the table at a time, export folds it, exactly: `embed_tokens` = the norm of each row, `lm_head` = the head as it is,
untied. That can't be undone: imported again, such a model is an untied one without the norm, with equal logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from openllama import pretrained
from openllama.config import ModelConfig
from openllama.files import folder_written_aside, read_json, write_json
from openllama.hf_config import MARK, config_from_hf, config_to_hf
from openllama.hf_patch import patch as patch  # what `openllama.hf` offers besides
from openllama.hf_patch import unpatch as unpatch
from openllama.model import Llama

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # HuggingFace's habit


class Part(NamedTuple):
    """One of HuggingFace's weights: rows start to stop of one of ours."""

    name: str
    ours: str
    start: int
    stop: int
    shape: tuple[int, ...]


def layout(config: ModelConfig) -> Iterator[Part]:
    """Every weight of HuggingFace's model of this shape. The fold of a stable embedding makes it untied."""
    c = config
    width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim

    def parts(ours: str, columns: int, rows: dict[str, int]) -> Iterator[Part]:
        start = 0
        for name, count in rows.items():
            shape = (count, columns) if columns else (count,)
            yield Part(f"{name}.weight", f"{ours}.weight", start, start + count, shape)
            start += count

    yield from parts("embed", c.hidden, {"model.embed_tokens": c.vocab_size})
    for i in range(c.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        qkv = {f"{attention}.q_proj": width, f"{attention}.k_proj": kv_width, f"{attention}.v_proj": kv_width}
        gate_up = {f"{mlp}.gate_proj": c.intermediate, f"{mlp}.up_proj": c.intermediate}
        yield from parts(f"{ours}.attention_norm", 0, {f"{theirs}.input_layernorm": c.hidden})
        yield from parts(f"{ours}.attention.wqkv", c.hidden, qkv)
        yield from parts(f"{ours}.attention.wo", width, {f"{attention}.o_proj": c.hidden})
        yield from parts(f"{ours}.mlp_norm", 0, {f"{theirs}.post_attention_layernorm": c.hidden})
        yield from parts(f"{ours}.mlp.w_gate_up", c.hidden, gate_up)
        yield from parts(f"{ours}.mlp.w_down", c.intermediate, {f"{mlp}.down_proj": c.hidden})
    yield from parts("norm", 0, {"model.norm": c.hidden})
    if not c.tied or c.stable_embedding:
        yield from parts("head", c.hidden, {"lm_head": c.vocab_size})


def exported_parameter_count(config: ModelConfig) -> int:
    """Parameters of the exported model: more than ours where the fold of a stable embedding unties the head."""
    return sum(torch.Size(part.shape).numel() for part in layout(config))


# ---------------------------------------------------------------- export


@torch.no_grad()
def export_hf(
    model: Llama,
    folder: str | Path,
    tokenizer_model: str | Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes `model` as HuggingFace's LlamaForCausalLM, whole or not at all.

    Args:
        folder: new, empty, or an earlier export of ours, which is replaced.
        tokenizer_model: our tokenizer.model: it goes along, with a tokenizer.json that gives the same ids, and its bos
            and eos go into the config.
        dtype: of the weights; None: the model's. The fold is computed in the model's dtype, as its forward does.
        shard_bytes: weights of more bytes are written as several files of about this size, with an index.

    Returns:
        The folder.

    Raises:
        FileExistsError: something else lies there. ValueError: a tokenizer that doesn't fit. OSError: a full disk.
    """
    dtype = dtype or model.embed.weight.dtype
    special: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer_model is not None:
        special = _hf_tokenizer().special_ids(tokenizer_model, model.config.vocab_size)
    size = exported_parameter_count(model.config) * dtype.itemsize
    with folder_written_aside(folder, size + 2**24, _is_our_export) as aside:
        if tokenizer_model is not None:
            _hf_tokenizer().write(tokenizer_model, aside, model.config.max_positions)
        write_json(aside / "config.json", config_to_hf(model.config, dtype) | special)
        write_json(aside / "generation_config.json", special)
        _write_weights(model, aside, dtype, shard_bytes)
    return Path(folder)


def _hf_tokenizer() -> ModuleType:
    from openllama import hf_tokenizer  # needs sentencepiece and tokenizers, which weights alone don't

    return hf_tokenizer


def _write_weights(model: Llama, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    parts = {part.name: part for part in layout(model.config)}
    # Planned on meta tensors: q, k and v share one storage of ours, which the helper would take for tied weights.
    shapes = {name: torch.empty(part.shape, dtype=dtype, device="meta") for name, part in parts.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    state = model.state_dict()
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: _exported(model, state, parts[name], dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _exported(model: Llama, state: dict[str, torch.Tensor], part: Part, dtype: torch.dtype) -> torch.Tensor:
    rows = state[part.ours].detach()[part.start : part.stop]
    if part.ours == "embed.weight" and model.embed_norm is not None:
        rows = model.embed_norm(rows)
    return rows.to("cpu", dtype).contiguous()


def _is_our_export(folder: Path) -> bool:
    """Whether nothing is lost when a new export takes this folder's place."""
    written = {"config.json", "generation_config.json", INDEX, "tokenizer.json", "tokenizer_config.json"}
    written |= {pretrained.TOKENIZER, *(p.name for p in folder.glob("model*.safetensors"))}
    if {p.name for p in folder.iterdir()} - written or not (folder / "config.json").is_file():
        return False
    try:
        return MARK in read_json(folder / "config.json")
    except ValueError:
        return False


# ---------------------------------------------------------------- import


def import_hf(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Llama:
    """Reads HuggingFace's LlamaForCausalLM from a local folder: safetensors, in one file or sharded.

    Args:
        folder: holds config.json and model.safetensors, or shards with model.safetensors.index.json.
        dtype: of the weights; None: as stored.
        device: where they go.

    Returns:
        The model, without stable embedding: the fold that an export made of one can't be undone (equal logits, untied).

    Raises:
        FileNotFoundError: a missing file. ValueError: a model that we don't build, or weights that don't fit, by name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; takes a local folder with config.json and safetensors"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json in it; takes a HuggingFace model's folder")
    config = config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    files = _weight_files(folder)
    parts = {part.name: part for part in layout(config)}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with pretrained.open_weights(file) as reader:
            shapes |= {n: tuple(reader.get_slice(n).get_shape()) for n in reader.keys() if not _is_ignored(n)}  # noqa: SIM118
    tied_head = config.tied and "lm_head.weight" in shapes
    if tied_head:  # some tools store the tied head as well
        parts["lm_head.weight"] = parts["model.embed_tokens.weight"]._replace(name="lm_head.weight")
    pretrained.check_weights(folder, shapes, {part.name: part.shape for part in parts.values()})
    model = pretrained.empty_model(config, dtype or _stored_dtype(files), device)
    _fill(model, files, parts)
    if tied_head:
        _check_tied_head(model, files, folder)
    return model


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{folder / INDEX}: got no weight_map, takes weights' names and their files")
        for name in set(names.values()):
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{folder / INDEX}: got file {name!r}, takes a .safetensors file of this folder"
                )
        return [folder / name for name in sorted(set(names.values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if pickled := [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]:
        raise ValueError(
            f"{folder}: got {pickled[0]}, takes model.safetensors: pickle can run code, so it is never loaded; "
            "save the model anew with transformers (save_pretrained writes safetensors)"
        )
    raise FileNotFoundError(
        f"{folder}: no model.safetensors and no {INDEX} in it; the folder is not complete"
    )


def _is_ignored(name: str) -> bool:
    # a table that releases before 4.32 saved; it follows from the config
    return name.endswith(".rotary_emb.inv_freq")


def _stored_dtype(files: list[Path]) -> torch.dtype:
    widest = None
    for file in files:
        with pretrained.open_weights(file) as reader:
            stored = pretrained.stored_dtype(reader, [n for n in reader.keys() if not _is_ignored(n)])  # noqa: SIM118
        widest = stored if widest is None else torch.promote_types(widest, stored)
    assert widest is not None
    return widest


def _fill(model: Llama, files: list[Path], parts: dict[str, Part]) -> None:
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for file in files:
        with pretrained.open_weights(file) as reader:
            for name in reader.keys():  # noqa: SIM118
                if name in parts:
                    part = parts[name]
                    state[part.ours][part.start : part.stop].copy_(reader.get_tensor(name))


def _check_tied_head(model: Llama, files: list[Path], folder: Path) -> None:
    """A head that is stored beside the table it is tied to must be the same: else one of the two would be lost."""
    for file in files:
        with pretrained.open_weights(file) as reader:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                if name in reader.keys() and not torch.equal(  # noqa: SIM118
                    reader.get_tensor(name).to(model.embed.weight), model.embed.weight.detach()
                ):
                    raise ValueError(
                        f"{folder}: lm_head.weight differs from model.embed_tokens.weight, but config.json says "
                        "tie_word_embeddings: true; set that to false there if the head is its own"
                    )
