"""The layer table of a model, as Open-Llama's README shows it, made on the meta device: nothing is allocated."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from openllama.config import ModelConfig
from openllama.files import read_json
from openllama.model import Llama, flops_per_token, parameter_count
from openllama.presets import PRESETS, preset

Row = tuple[str, str, str]


def find_config(name: str) -> ModelConfig:
    """A preset by name, or a model folder's config.json. Raises ValueError naming the nearest preset."""
    path = Path(name)
    if name not in PRESETS and (path.suffix == ".json" or path.exists()):
        from openllama.hf_config import config_from_hf

        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; takes a preset or a config.json")
        values = read_json(path)
        return config_from_hf(values, str(path)) if "architectures" in values else ModelConfig.load(path)
    return preset(name)


def layer_table(config: ModelConfig, seq: int = 64) -> str:
    """Layers, output shapes for ids of shape [1, seq], and parameters, as text."""
    seq = min(seq, config.max_positions)
    with torch.device("meta"):
        model = Llama(config)
        shapes = _output_shapes(model, seq)
    total = parameter_count(config)
    rows: list[Row] = [("LlamaForCausalLM", f"[1, {seq}, {config.vocab_size}]", "--")]
    rows.append(("├─LlamaModel", shapes[model.norm], "--"))
    rows.append(("│  ├─Embedding", shapes[model.embed], _count(model.embed)))
    if model.embed_norm is not None:
        rows.append(("│  ├─LayerNorm (stable embedding)", shapes[model.embed_norm], _count(model.embed_norm)))
    for i, layer in enumerate(model.layers):
        rows.append((f"│  ├─DecoderLayer {i + 1}", shapes[layer], _count(layer)))
        if i == 0:  # all are alike: the parts of the first stand for those of the others
            rows += [(f"│  │  ├─{name}", shapes[part], _count(part)) for name, part in _parts(layer)]
    rows.append(("│  └─RMSNorm", shapes[model.norm], _count(model.norm)))
    head = "0 (tied)" if config.tied else _count(model.head)
    rows.append(("└─Linear", f"[1, {seq}, {config.vocab_size}]", head))
    table = columns([("Layer", "Output shape", "Parameters"), *rows], numbers=(2,))
    rule = "=" * max(map(len, table.splitlines()))
    header, body = table.split("\n", 1)
    totals = (
        f"Total params: {total:,}\n"
        f"Trainable params: {total:,}\n"
        f"Non-trainable params: 0\n"
        f"Weights: {total * 2 / 1e9:.2f} GB in bfloat16, {total * 4 / 1e9:.2f} GB in float32\n"
        f"Training FLOPs per token at {config.max_positions} tokens: "
        f"{flops_per_token(config, config.max_positions) / 1e9:.4g} G (6 x multiplying parameters + causal attention)"
    )
    return "\n".join([rule, header, rule, body, rule, totals, rule])


def columns(rows: list[tuple[str, ...]], numbers: tuple[int, ...] = ()) -> str:
    """Rows as text with aligned columns; those in `numbers` to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _parts(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = {"RMSNorm", "Linear"}
    return [(f"{type(m).__name__}: {n}", m) for n, m in layer.named_modules() if type(m).__name__ in kinds]


def _count(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"


@torch.no_grad()
def _output_shapes(model: Llama, seq: int) -> dict[nn.Module, str]:
    """What each module puts out in a real forward on the meta device. The model works on a flat row of tokens."""
    shapes: dict[nn.Module, str] = {}

    def note(module: nn.Module, _: object, out: object) -> None:
        first = out[0] if isinstance(out, tuple) else out
        shapes[module] = str([1, *first.shape])  # type: ignore[attr-defined]
        if module is model.layers[0]:  # whose parts are weights for one function, which calls no module
            for _, part in _parts(model.layers[0]):
                shapes[part] = str([1, seq, len(part.weight)])  # type: ignore[arg-type]

    hooks = [m.register_forward_hook(note) for m in model.modules()]
    model(torch.zeros(1, seq, dtype=torch.int64, device="meta"))
    for hook in hooks:
        hook.remove()
    return shapes
