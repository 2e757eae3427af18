"""The repository beside other packages, type checkers, and a wheel of it outside and inside the repository."""

import fcntl
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))


def run(command, cwd=ROOT, **environment):
    """stdout of a command that must succeed, run without what pytest put into the environment."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OPENLLAMA_BACKEND")}
    clean |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---------------------------------------------------------------- HuggingFace's package `kernels`

HF_LLAMA = """
import kernels, torch
from importlib.metadata import version
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
assert LlamaForCausalLM(config)(torch.zeros(1, 5, dtype=torch.int64)).logits.shape == (1, 5, 50)
print(kernels.__file__)
"""


def test_transformers_llama_runs_in_the_repo():
    """With each folder that a script or a user may stand in first on the path."""
    assert find_spec("kernels").origin, "HuggingFace's package is not installed: pip install kernels"
    folders = [str(ROOT / name) for name in ("", "train", "openllama")]
    file = Path(run([sys.executable, "-c", f"import sys\nsys.path[:0] = {folders}\n{HF_LLAMA}"]).strip())
    assert "site-packages" in file.parts  # theirs, not our folder


def test_kernels_import_nothing_else_of_openllama():
    for path in (ROOT / "kernels").rglob("*.py"):
        text = path.read_text()
        assert "import openllama" not in text and "from openllama" not in text, path


def test_openllama_info_runs_in_the_repo():
    out = run([SCRIPTS / "openllama", "info"])
    assert out == run([sys.executable, "-m", "openllama.cli", "info"])
    for word in ("Python", "torch", "native library", "rms_norm", "attention", "bfloat16"):
        assert word in out
    forced = run([SCRIPTS / "openllama", "info"], OPENLLAMA_BACKEND="reference")
    assert "OPENLLAMA_BACKEND forces reference" in forced


def test_help_needs_no_torch():
    code = "import sys, openllama.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    assert "summary" in run([sys.executable, "-c", code])


# ---------------------------------------------------------------- type checkers


def test_pyright_resolves_openllama_kernels(tmp_path):
    code = "from openllama.kernels.rms_norm import rms_norm\nfrom openllama.ops import swiglu\nreveal_type(rms_norm)\n"
    (tmp_path / "use.py").write_text(code)
    settings = {"include": [str(tmp_path)], "extraPaths": [str(ROOT)], "venvPath": str(SCRIPTS.parents[1])}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings | {"venv": SCRIPTS.parent.name}))
    pyright = SCRIPTS / "pyright"
    if not pyright.exists():
        pytest.fail("pyright is not installed: pip install -e .[dev]")
    done = subprocess.run(
        [pyright, "-p", tmp_path, "--outputjson"], capture_output=True, text=True, timeout=200
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert [d for d in found if d["severity"] == "error"] == []
    assert any('Type of "rms_norm" is' in d["message"] and "Unknown" not in d["message"] for d in found)


# ---------------------------------------------------------------- a wheel

USE = """
import pathlib, sys, torch, openllama
from openllama.kernels import library
from openllama.kernels.rms_norm import rms_norm
from openllama.presets import preset
x = torch.randn(3, 8)
torch.testing.assert_close(rms_norm(x, torch.ones(8)), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
assert preset("7b").layers == 32 and not library.missing, library.missing
print(pathlib.Path(openllama.__file__).parent, pathlib.Path(library.__file__).resolve().parent, sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with open(ROOT / "setup.py") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist's workers would build in one folder at once
        run(
            [
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "--no-build-isolation",
                "--no-deps",
                "-q",
                "-w",
                folder,
                ".",
            ]
        )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    run([sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", target, wheel])
    return target


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licence = next(n for n in names if n.endswith("/LICENSE"))
        assert b"MIT License" in archive.read(licence)
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {
        "openllama"
    }  # no `kernels`, `tests`, `train`
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "openllama").rglob("*.py")}
    sources |= {f"openllama/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == sources
    assert "openllama/kernels/_C.abi3.so" in names
    assert "License-Expression: MIT" in metadata and "Requires-Python: >=3.10" in metadata
    for extra in ("train", "bench", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


def test_an_installed_wheel_works_outside_the_repo(installed, tmp_path):
    package, kernels = run([sys.executable, "-c", USE], tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(package) == installed / "openllama" and Path(kernels) == installed / "openllama/kernels"
    out = run([installed / "bin/openllama", "summary", "tiny"], tmp_path, PYTHONPATH=str(installed))
    assert "Total params: 1,312,128" in out


def test_an_installed_wheel_works_inside_the_repo(installed, tmp_path):
    """A script, run from the repo root, gets the installed package; `python -c` the working tree. Neither is a mixture."""
    (tmp_path / "use.py").write_text(USE)
    package, kernels = run(
        [sys.executable, tmp_path / "use.py"], ROOT, PYTHONPATH=str(installed)
    ).splitlines()
    assert Path(package) == installed / "openllama" and Path(kernels) == installed / "openllama/kernels"
    package, kernels = run([sys.executable, "-c", USE], ROOT, PYTHONPATH=str(installed)).splitlines()
    assert Path(package) == ROOT / "openllama" and Path(kernels) == ROOT / "kernels"


# ---------------------------------------------------------------- files


def test_files_that_every_clone_holds():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    for name in ("README.md", "CHANGELOG.md", "CITATION.cff"):
        assert (ROOT / name).stat().st_size, name
    unreleased = "unreleased" in (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1].splitlines()[0].lower()
    assert unreleased == ("date-released" not in (ROOT / "CITATION.cff").read_text())


def test_nothing_shadows_another_package():
    """A script's folder is first on the path: train/evaluate.py would hide HuggingFace's `evaluate`."""
    assert not (ROOT / "kernels/__init__.py").exists()  # or transformers would take it for HuggingFace's
    assert os.readlink(ROOT / "openllama/kernels") == "../kernels"
    ours = [p.stem for folder in ("train", "benchmarks") for p in (ROOT / folder).glob("*.py")]
    taken = {
        "evaluate",
        "datasets",
        "tokenizers",
        "transformers",
        "accelerate",
        "torch",
        "peft",
        "trl",
        "kernels",
    }
    assert not taken & {*ours} and not set(sys.stdlib_module_names) & {*ours}
