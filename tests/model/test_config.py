import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from openllama.config import ModelConfig, from_dict, load
from openllama.presets import PRESETS

from .models import LLAMA3, YARN

SHAPE = {"vocab_size": 100, "hidden": 64, "intermediate": 96, "layers": 2, "heads": 4}


@dataclass
class Inner:
    rate: float = 0.5
    names: list[str] = field(default_factory=list)


@dataclass
class Outer:
    steps: int
    lr: float = 1e-3
    path: str | None = None
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides):
        (tmp_path / "c.yaml").write_text(text)
        return load(Outer, tmp_path / "c.yaml", overrides)

    return read


def test_values_and_defaults(read):
    assert read("steps: 3") == Outer(3)
    assert read("steps: 3\nlr: 2e-4").lr == 2e-4  # a string to YAML 1.1
    assert read("steps: 1e3").steps == 1000 and isinstance(read("steps: 2.0").steps, int)
    assert read("steps: 3\npath: null\ninner: {rate: 1, names: [x]}").inner == Inner(1.0, ["x"])


def test_overrides(read):
    got = read(
        "steps: 3\ninner: {rate: 0.1}",
        "steps=7",
        "lr=2e-4",
        "inner.names=[a, b]",
        "path=x=y",
        "flag=true",
        "kind=b",
    )
    assert got == Outer(7, 2e-4, "x=y", "b", True, inner=Inner(0.1, ["a", "b"]))
    assert read("steps: 3", "inner.rate=3").inner.rate == 3.0
    assert read("steps: 3", "extra.deep.er=1").extra == {"deep": {"er": 1}}
    assert read("", "steps=3") == Outer(3)
    assert read("steps: 3\npath: a", "path=null").path is None


def test_a_config_that_is_not_text_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"c\.yaml: not valid YAML"):
        load(ModelConfig, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("step: 3", (), r"c\.yaml: unknown key 'step'; did you mean 'steps'\?"),
        ("steps: 3\nzzz: 1", (), r"unknown key 'zzz'; takes one of extra, flag, inner, kind"),
        ("steps: 3", ("inner.rat=1",), r"inner: unknown key 'rat'; did you mean 'rate'\?"),
        ("lr: 1", (), r"missing key 'steps', takes a value of type int"),
        ("steps: many", (), r"steps: got 'many', takes a value of type int"),
        ("steps: 2.5", (), r"steps: got 2\.5, takes a value of type int"),
        ("steps: true", (), r"steps: got True, takes a value of type int"),
        ("steps: 3\nlr: fast", (), r"lr: got 'fast', takes a value of type float"),
        ("steps: 3\nlr: true", (), r"lr: got True"),
        ("steps: 3\nflag: 1", (), r"flag: got 1, takes a value of type bool"),
        ("steps: 3\npath: 5", (), r"path: got 5, takes a value of type str"),
        ("steps: 3\nkind: c", (), r"kind: got 'c'; takes one of a, b"),
        ("steps: 3\ninner: 4", (), r"inner: got 4, takes a group of keys"),
        ("steps: 3\ninner: {names: [a, 1]}", (), r"inner: names\[1\]: got 1, takes a value of type str"),
        ("steps: null", (), r"steps: got None"),
        ("- 1", (), r"got a list, takes a mapping"),
        ("a: [", (), r"c\.yaml: not valid YAML"),
        ("steps: 3", ("lr",), r"override 'lr': takes key=value"),
        ("steps: 3", ("steps.x=1",), r"override 'steps\.x=1': 'steps' is not a group"),
        ("steps: 3", ("lr=[",), r"override 'lr=\['"),
        ("steps: 3\n1: 2", (), r"unknown key 1"),
    ],
)
def test_errors_name_the_file_the_key_and_what_it_takes(read, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        read(text, *overrides)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load(Outer, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": 0}, "layers: got 0"),
        ({"vocab_size": -1}, "vocab_size: got -1"),
        ({"kv_heads": 3}, "kv_heads: got 3, takes a divisor of heads=4"),
        ({"hidden": 66}, "head_dim: hidden=66 is not divisible by heads=4; give head_dim itself"),
        ({"head_dim": 7}, "head_dim: got 7, takes an even number"),
        ({"norm_eps": float("nan")}, "norm_eps: got nan, takes a finite number above 0"),
        ({"norm_eps": 0.0}, "norm_eps: got 0"),
        ({"rope_theta": -5.0}, "rope_theta: got -5"),
        ({"rope_theta": float("inf")}, "rope_theta: got inf"),
        ({"init_std": -1.0}, "init_std: got -1"),
        ({"init_std": float("nan")}, "init_std: got nan"),
        (
            {"rope_scaling": {}},
            "rope_scaling: got rope_type None, takes one of default, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "rope_scaling: got rope_type 'longrope'"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            "embeddings: got 0, takes a number above 0 for 'yarn'",
        ),
        ({"rope_scaling": YARN | {"beta_slow": 9}}, "beta_fast: got 8.0, takes at least beta_slow=9"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast: got 0.5, takes at least beta_slow=1"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate: got 1, takes True or False for 'yarn'"),
        ({"rope_scaling": YARN | {"mscale": -1.0}}, "mscale: got -1.0, takes a number of at least 0"),
        (
            {"rope_scaling": YARN | {"attention_factor": 0.0}},
            "attention_factor: got 0.0, takes a number above 0",
        ),
        (
            {"rope_scaling": YARN | {"low_freq_factor": 1.0}},
            "low_freq_factor: unknown for 'yarn', takes factor, original",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor: got None, takes a number above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "rope_scaling: factor: got nan"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta": 1}}, "beta: unknown for 'linear'"),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "high_freq_factor: got 1.0, takes more than low_freq_factor=1.0",
        ),
    ],
)
def test_model_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SHAPE | change)


def test_a_refused_value_names_the_file(tmp_path):
    config = dataclasses.asdict(ModelConfig(**SHAPE)) | {"norm_eps": -1.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: norm_eps: got -1"):
        ModelConfig.load(tmp_path / "config.json")


def test_settings_and_files_need_no_torch():
    code = "import sys, openllama.config, openllama.files; assert not {'torch', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_model_config_defaults_save_and_load(tmp_path):
    config = ModelConfig(**SHAPE)
    assert (config.kv_heads, config.head_dim) == (4, 16)
    for config in PRESETS.values():
        config.save(tmp_path / "config.json")
        assert ModelConfig.load(tmp_path / "config.json") == config
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config) | {"hiden": 1}))
    with pytest.raises(ValueError, match=r"config\.json: unknown key 'hiden'; did you mean 'hidden'\?"):
        ModelConfig.load(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json: unknown key 'architectures'"):
        from_dict(ModelConfig, {"architectures": ["LlamaForCausalLM"]}, "config.json")
