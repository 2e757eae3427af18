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
    """make(TORCH) gives the commands of `make test` in a clone that was set up with torch==2.12.0."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / ".venv").mkdir()
    for name in ("setup.py", "pyproject.toml", ".venv/.torch", ".venv/.ready", ".venv/.ready-dev"):
        (tmp_path / name).write_text("torch==2.12.0\n" if name.endswith("torch") else "")

    def make(torch: str | None) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("TORCH", "MAKEFLAGS", "MAKELEVEL")}
        environment |= {} if torch is None else {"TORCH": torch}
        done = subprocess.run(
            ["make", "--dry-run", "test"], cwd=tmp_path, env=environment, capture_output=True, text=True
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
