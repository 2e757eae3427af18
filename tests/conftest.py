"""What every test needs: the `gpu` mark skips where there is no GPU, and parallel workers share the cores."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).resolve().parents[1] / "train"

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        # the longest tests first: with short ones left, the workers end together
        items.sort(key=lambda item: item.path.parent.name != "training")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # here, so that tests without one start fast

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture
def one_thread():
    """For small tensors, and workers that share the cores; a test that wants threads asks for them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def script(monkeypatch, capfd):
    """Runs train/NAME.py with arguments in this process: a new one takes seconds to import torch."""

    def run(name, *arguments):
        command = [str(TRAIN / f"{name}.py"), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(command[0], run_name="__main__")
        code, (out, errors) = ended.value.code, capfd.readouterr()
        if isinstance(code, str):  # which Python would print
            code, errors = 1, f"{errors}{code}\n"
        return subprocess.CompletedProcess(command, code, out, errors)

    return run
