"""How our scripts end on an error: one line for the user's mistakes, a traceback for bugs of ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from openllama import cli
from openllama.hf import export_hf

from .models import make

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "prepare_data": ["--source", "none.jsonl", "--out", "out"],
    "train_tokenizer": ["--shards", "none", "--out", "t.model"],
    "generate": ["--checkpoint", "none"],
    "pretrain": ["--config", "none.yaml"],
    "inspect_data": ["--config", "none.yaml"],
    "merge_tokenizer": ["--base", "none", "--add", "none", "--out", "out.model"],
    "quickstart": ["--config", "none.yaml"],
}


def script(name, folder, *, without=None, arguments=None, **environment):
    """Runs train/NAME.py in `folder`, as if the package `without` were not installed."""
    argv = [f"{name}.py", *(arguments or SCRIPTS[name])]
    hide = f"sys.modules[{without!r}] = None" if without else ""
    path = ROOT / "train" / f"{name}.py"
    code = f"import runpy, sys\nsys.path[:0] = [{str(ROOT)!r}]\nsys.argv = {argv!r}\n{hide}\n"
    code += f"runpy.run_path({str(path)!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_users_mistake_takes_one_line(name, tmp_path):
    done = script(name, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "none" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps: got 0, takes a whole number of at least 1"),
        (
            ["--preset", "tiny", "--seq", "2048"],
            "--seq: got 2048, takes at most 1024, the max_positions of tiny",
        ),
    ],
)
def test_a_benchmark_checks_its_arguments_first(arguments, message):
    command = [sys.executable, "-m", "benchmarks.tokens_per_second", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


def test_debug_shows_the_traceback(tmp_path):
    done = script("prepare_data", tmp_path, OPENLLAMA_DEBUG="1")
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert re.search("\nerror: source: none.jsonl does not exist", done.stderr)


@pytest.mark.parametrize(
    "name, package",
    [
        ("prepare_data", "zstandard"),
        ("train_tokenizer", "sentencepiece"),
        ("generate", "sentencepiece"),
        ("pretrain", "accelerate"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(name, package, tmp_path):
    done = script(name, tmp_path, without=package)
    assert done.returncode == 1
    assert done.stderr == f'error: {package} is not installed; pip install "openllama[train]"\n'


@pytest.mark.parametrize("source, package", [("hf:name", "datasets"), ("a.parquet", "pyarrow")])
def test_a_source_whose_package_is_not_installed(source, package, tmp_path):
    (tmp_path / "a.parquet").touch()
    done = script("prepare_data", tmp_path, without=package, arguments=["--source", source, "--out", "out"])
    assert (done.returncode, done.stderr) == (
        1,
        f'error: {package} is not installed; pip install "openllama[data]"\n',
    )


@pytest.mark.parametrize("package", ["huggingface_hub", "sentencepiece"])
def test_the_command_names_missing_packages_too(package, tmp_path, monkeypatch, capsys):
    def missing():
        raise ModuleNotFoundError(f"No module named '{package}.sub'", name=f"{package}.sub")

    assert cli.exit_code(missing) == 1
    assert capsys.readouterr().err == f'error: {package} is not installed; pip install "openllama[train]"\n'
    if package == "huggingface_hub":
        export_hf(make(), tmp_path / "hf")
        monkeypatch.setitem(sys.modules, package, None)
        assert cli.main(["export", str(tmp_path / "hf"), str(tmp_path / "again")]) == 1
        assert capsys.readouterr().err.startswith("error: huggingface_hub is not installed")


def test_import_says_that_a_fold_stays(tmp_path, capsys):
    for stable in (True, False):
        folder = tmp_path / str(stable)
        export_hf(make(stable_embedding=stable), folder / "hf")
        assert cli.main(["import", str(folder / "hf"), str(folder / "ours")]) == 0
        assert ("stable embedding stays folded" in capsys.readouterr().out) == stable


@pytest.mark.parametrize("extra", cli.OPTIONAL)
def test_every_package_of_an_extra_is_known(extra):
    """By the name that `import` takes."""
    line = next(x for x in (ROOT / "pyproject.toml").read_text().splitlines() if x.startswith(f"{extra} = ["))
    names = set(re.findall(r'"(\w+)', line)) - {"openllama", "protobuf"}
    assert names <= cli.OPTIONAL[extra] and "google" in cli.OPTIONAL["train"]


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, FloatingPointError])
def test_users_errors(kind, capsys):
    def fails():
        raise kind("what it got")

    assert cli.exit_code(fails) == 1
    assert capsys.readouterr().err == "error: what it got\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyError("x"), ImportError("x"), ModuleNotFoundError("x", name="torhc")]
)
def test_bugs_keep_their_traceback(error):
    def fails():
        raise error

    with pytest.raises(type(error)):
        cli.exit_code(fails)


def test_exit_codes_go_through():
    assert cli.exit_code(lambda: None) == 0 and cli.exit_code(lambda: 143) == 143
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: 143)
    assert ended.value.code == 143


def test_a_reader_that_has_enough_is_no_error():
    """`openllama summary 65b | head -n 1`, where head is gone before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "openllama.cli", "summary", "tiny"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
