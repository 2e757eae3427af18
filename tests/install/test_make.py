"""The Makefile: what it would do, by `make --dry-run` in a folder whose set-up seems done."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not here")


@pytest.fixture
def clone(tmp_path):
    """make(TORCH, words) gives the commands of `make test`, or of other words, in a clone set up with torch==2.12.0."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / ".venv").mkdir()
    for name in ("setup.py", "pyproject.toml", ".venv/.torch", ".venv/.ready", ".venv/.ready-dev"):
        (tmp_path / name).write_text("torch==2.12.0\n" if name.endswith("torch") else "")

    def make(torch: str | None, *words: str) -> str:
        environment = {
            k: v for k, v in os.environ.items() if k not in ("TORCH", "LANGS", "MAKEFLAGS", "MAKELEVEL")
        }
        environment |= {} if torch is None else {"TORCH": torch}
        done = subprocess.run(
            ["make", "--dry-run", *(words or ["test"])],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return make


@pytest.mark.parametrize("torch", (None, "torch==2.12.0"))
def test_the_torch_that_is_there_stays(clone, torch):
    commands = clone(torch)
    assert "pytest" in commands and "pip" not in commands


def test_another_torch_is_installed_and_all_built_again(clone):
    commands = clone("torch==2.13.0")
    assert commands.index("uninstall -q -y torch") < commands.index("install $TORCH")
    assert commands.index("install $TORCH") < commands.index("no-build-isolation") < commands.index("pytest")


@pytest.mark.parametrize("words", (["quickstart"], ["quickstart", "LANGS=0"]))
def test_the_quickstart_alone_takes_no_languages(clone, words):
    assert clone(None, *words).split() == [".venv/bin/python", "-m", "train.quickstart"]


def test_languages_install_their_extra_once_and_take_their_config(clone, tmp_path):
    commands = clone(None, "quickstart", "LANGS=1")
    assert commands.index('".[train,bench,langs]"') < commands.index("train/configs/tiny-langs.yaml")
    (tmp_path / ".venv/.ready-langs").touch()
    commands = clone(None, "quickstart", "LANGS=1")
    assert "pip" not in commands and "tiny-langs.yaml" in commands
