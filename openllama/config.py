"""The shape of a Llama, and the one way this project reads settings: a dataclass, a YAML file, key=value overrides."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from openllama.files import read_json, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a dense Llama. Sizes are in elements; `kv_heads` and `head_dim` default to the usual choice."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int = 0  # 0: as many as heads (multi-head attention)
    head_dim: int = 0  # 0: hidden / heads
    max_positions: int = 2048  # rows of the rotary tables: the longest document the model reads
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # HuggingFace's dictionary, see kernels/rotary_tables.py
    tied: bool = False  # the head is the embedding table
    stable_embedding: bool = False  # Open-Llama's LayerNorm right after the embedding
    init_std: float = 0.01

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden", "intermediate", "layers", "heads", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes a whole number of at least 1")
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: got {self.kv_heads}, takes a divisor of heads={self.heads}")
        if not self.head_dim:
            if self.hidden % self.heads:
                raise ValueError(
                    f"head_dim: hidden={self.hidden} is not divisible by heads={self.heads}; give head_dim itself"
                )
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, takes an even number (rotary turns pairs)")
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes a finite number above 0")
        if not 0 <= self.init_std < math.inf:
            raise ValueError(f"init_std: got {self.init_std}, takes a finite number of at least 0")
        if self.rope_scaling is not None:
            from openllama.kernels.rotary_tables import (
                check_rope_scaling,
            )  # here: settings are read without torch

            check_rope_scaling(self.rope_scaling, "rope_scaling")

    def save(self, path: str | Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> ModelConfig:
        return from_dict(cls, read_json(path), str(path))


LISTED = 100  # choices in a message


def nearest(name: str, choices: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice closest to `name`, or the list of all choices."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    listed = sorted(choices)[:LISTED] + (["..."] if len(choices) > LISTED else [])
    return f"; takes one of {', '.join(listed)}"


def from_dict(cls: type[T], values: dict[str, Any], source: str) -> T:
    """Builds the dataclass `cls` from `values`, converting each value to its field's type.

    Raises ValueError naming `source`, the key, what it got and what it takes.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(f"{source}: unknown key {key!r}{nearest(str(key), fields)}")
    missing = [
        n
        for n, f in fields.items()
        if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(
            f"{source}: missing key {missing[0]!r}, takes a value of type {_type_name(hints[missing[0]])}"
        )
    converted = {k: _convert(v, hints[k], f"{source}: {k}") for k, v in values.items()}
    try:
        return cls(**converted)
    except ValueError as e:  # of a value that its __post_init__ refuses
        raise ValueError(f"{source}: {e}") from None


def load(cls: type[T], path: str | Path, overrides: typing.Sequence[str] = ()) -> T:
    """Reads `cls` from a YAML file, then applies `key=value` overrides (values are YAML too; `a.b=c` reaches into a)."""
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not valid YAML: {e}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a {type(values).__name__}, takes a mapping of keys to values")
    for override in overrides:
        key, eq, value = override.partition("=")
        if not eq:
            raise ValueError(f"override {override!r}: takes key=value")
        *outer, last = key.split(".")
        inner = values
        for part in outer:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"override {override!r}: {part!r} is not a group of keys")
        try:
            inner[last] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise ValueError(f"override {override!r}: the value is not valid YAML: {e}") from None
    return from_dict(cls, values, " ".join([str(path), *(f"with {o}" for o in overrides)]))


def _type_name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        fitting = (a for a in kinds if isinstance(value, typing.get_origin(a) or a))
        return _convert(value, next(fitting, kinds[0]), where)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where}: got {value!r}{nearest(str(value), map(str, args))}")
        return value
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: got {value!r}, takes a group of keys")
        return from_dict(kind, value, where)  # type: ignore[arg-type]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 2e-4 as a string
        except ValueError:
            pass
    if kind is int and isinstance(value, str):
        value = _whole(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    plain = origin or kind
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ValueError(f"{where}: got {value!r}, takes a value of type {_type_name(kind)}")
    if isinstance(value, list) and args:
        return [_convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict) and args:
        return {_convert(k, args[0], where): _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    return value


def _whole(text: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else text
