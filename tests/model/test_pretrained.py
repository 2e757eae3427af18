"""Model folders, the commands that work on them, and train/generate.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openllama import cli, tokenizer
from openllama.config import ModelConfig
from openllama.hf import export_hf, import_hf
from openllama.load import find_model, load_model
from openllama.presets import PRESETS
from openllama.pretrained import save_model, step_folder, steps
from openllama.summary import find_config
from openllama.training import checkpoint

from .models import make

ROOT = Path(__file__).resolve().parents[2]


def equal(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    text = Path(tokenizer.__file__).read_text()
    return tokenizer.train([text], tmp_path_factory.mktemp("t") / "tokenizer.model", 400).path


@pytest.fixture
def run_folder(tmp_path, model_file):
    """A run's checkpoints/ with two steps."""
    for step in (90, 100):
        model = make(seed=step, vocab_size=400, tied=True, stable_embedding=True)
        save_model(model, tmp_path / "checkpoints" / f"step-{step:08d}", model_file)
    (tmp_path / "checkpoints/.step-00000200.writing").mkdir()
    return tmp_path / "checkpoints"


def test_save_and_load(kind, tmp_path):
    model = make(**kind)
    back, path = load_model(save_model(model, tmp_path / "m"))
    assert back.config == model.config and equal(back, model) and path is None
    assert (back.head.weight is back.embed.weight) == model.config.tied
    assert ("head.weight" in load_file(tmp_path / "m/model.safetensors")) == (not model.config.tied)
    assert load_model(tmp_path / "m", torch.bfloat16)[0].embed.weight.dtype == torch.bfloat16
    assert all(p.requires_grad for p in back.parameters())
    modes = {p.stat().st_mode for p in (tmp_path / "m").iterdir()}
    assert len(modes) == 1  # the weights are as readable as the config


def test_the_highest_step_and_one_step(run_folder):
    model, path = load_model(run_folder)
    assert path == run_folder / "step-00000100/tokenizer.model"
    assert equal(model, make(seed=100, vocab_size=400, tied=True, stable_embedding=True))
    assert equal(
        load_model(run_folder / "step-00000090")[0],
        make(seed=90, vocab_size=400, tied=True, stable_embedding=True),
    )


def test_an_export_is_loaded_too(tmp_path, model_file):
    model = make(vocab_size=400, kv_heads=2)
    back, path = load_model(export_hf(model, tmp_path / "hf", model_file))
    assert equal(back, model) and path == tmp_path / "hf/tokenizer.model"


def test_load_errors(run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such folder; takes a checkpoint"):
        load_model(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no config\.json and no step-\* folder"):
        load_model(tmp_path / "empty")
    file = run_folder / "step-00000100/model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if k != "norm.weight"} | {"extra": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*missing norm\.weight; unexpected extra"):
        load_model(run_folder)
    save_file(whole | {"norm.weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"norm\.weight has shape \(3,\), takes \(48,\)"):
        load_model(run_folder)
    file.write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(run_folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        load_model(run_folder)
    with pytest.raises(FileExistsError):
        save_model(make(), run_folder)


# ---------------------------------------------------------------- commands


def test_export_and_import_commands(run_folder, tmp_path, capsys):
    assert cli.main(["export", str(run_folder), str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "step-00000100" in out and "import can't undo this" in out
    assert cli.main(["import", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    back, path = load_model(tmp_path / "back")
    assert path is not None and back.embed.weight.dtype == torch.bfloat16
    assert equal(back, import_hf(tmp_path / "hf"))
    assert cli.main(["import", str(tmp_path / "hf"), str(tmp_path / "back")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "back: is there already" in error and error.count("\n") == 1


def test_summary_command(capsys, tmp_path):
    assert cli.main(["summary", "7b"]) == 0
    out = capsys.readouterr().out
    assert out.count("202,383,360") == 32 and "Total params: 6,885,879,808" in out
    for line in ("409,600,000", "8,192", "4,096", "0 (tied)", "[1, 64, 100000]"):
        assert line in out
    for name, config in PRESETS.items():
        assert cli.main(["summary", name]) == 0
        by_name = capsys.readouterr().out
        config.save(tmp_path / "config.json")
        assert find_config(name) == find_config(str(tmp_path / "config.json")) == config
    assert cli.main(["summary", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out == by_name
    export_hf(make(), tmp_path / "hf")
    assert cli.main(["summary", str(tmp_path / "hf")]) == 0
    assert cli.main(["summary", "7bb"]) == 1
    assert "got '7bb'; did you mean '7b'?" in capsys.readouterr().err


def test_generate_script(run_folder, script):
    """Here as in a process of its own."""
    asked = ["--checkpoint", run_folder, "--max-new-tokens", "5", "--prompt", "def f", "--prompt", " x"]
    asked += ["--device", "cpu"]
    first, command = script("generate", *asked), [sys.executable, ROOT / "train/generate.py", *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert first.stdout == again.stdout and "--- sample 2\n x" in first.stdout and "def f" in first.stdout
    assert "tokens/s on cpu" in first.stderr and "tokens/s on cpu" in again.stderr
    asked[1] = run_folder / "none"
    failed = script("generate", *asked)
    assert failed.returncode == 1 and "none: no such folder" in failed.stderr
    assert failed.stderr.startswith("error: ")
    asked[1], asked[-1] = run_folder, "cuda:99"
    failed = script("generate", *asked)
    assert failed.returncode == 1 and failed.stderr.startswith("error: --device: got 'cuda:99', takes cpu")


def test_generate_script_with_one_prompt(run_folder, script):
    """Its text comes in pieces, and ends at a stop string."""
    asked = ["--checkpoint", run_folder, "--device", "cpu", "--max-new-tokens", "40", "--prompt", "def f"]
    whole = script("generate", *asked)
    assert whole.returncode == 0, whole.stderr
    text = whole.stdout.removeprefix("def f").removesuffix("\n")
    assert re.fullmatch(
        r"\[(3\d|40) tokens, the first after \d+\.\d\d s, then \d+\.\d tokens/s on cpu\]\n", whole.stderr
    )
    stop = next(text[i : i + 2] for i in range(len(text) // 2, len(text)) if text[i].isalpha())
    ended = script("generate", *asked, "--stop", "no such text", "--stop", stop)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"def f{text[: text.index(stop)]}\n" and ended.stdout != whole.stdout
    none = script("generate", *asked, "--max-new-tokens", "0")
    assert none.stdout == "def f\n" and none.stderr.startswith("[0 tokens, ")
    wrong = script("generate", *asked, "--stop", "")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: stop: got ['']")


def test_a_step_folder_is_found_in_one_way(run_folder):
    """What the run would not resume from isn't loaded either."""
    (run_folder / "step-200").mkdir()
    (run_folder / "step-000000300").mkdir()
    (run_folder / "step-00000400").touch()
    assert steps(run_folder) == checkpoint.steps(run_folder) == [90, 100]
    assert find_model(run_folder) == run_folder / "step-00000100"
    (run_folder / "step-100000000").mkdir()
    assert steps(run_folder)[-1] == 100_000_000
    assert find_model(run_folder) == step_folder(run_folder, 100_000_000)


# ---------------------------------------------------------------- damaged JSON


@pytest.mark.parametrize("text", ['{"vocab_size": 40', "", "\xff", "[1]", "9" * 5000])
def test_damaged_json_is_named(run_folder, text):
    place = run_folder / "step-00000100"
    for file, read in (
        ("config.json", lambda: ModelConfig.load(place / "config.json")),
        ("config.json", lambda: load_model(place)),
        ("config.json", lambda: find_config(str(place))),
        ("state.json", lambda: checkpoint.read_state(place)),
    ):
        (place / file).write_bytes(text.encode("latin-1"))
        with pytest.raises(
            ValueError, match=rf"{file}: (not valid JSON|got a JSON (list|int), takes an object)"
        ):
            read()
    (place / "state.json").write_text('{"version": 7}')
    with pytest.raises(ValueError, match=r"state\.json: got version 7, takes 1"):
        checkpoint.read_state(place)


def test_a_damaged_index_of_an_import_is_named(tmp_path):
    export_hf(make(), tmp_path / "hf", shard_bytes=20_000)
    (tmp_path / "hf/model.safetensors.index.json").write_text('{"weight_map": {')
    with pytest.raises(ValueError, match=r"index\.json: not valid JSON"):
        import_hf(tmp_path / "hf")
