"""Devices, and the parameters of the tests that `contract.Contract` gives to every op."""

import pytest
import torch

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)
    for name in ("dtype", "size", "compiler"):
        if name in metafunc.fixturenames and hasattr(metafunc.cls, f"{name}s"):
            metafunc.parametrize(
                name, getattr(metafunc.cls, f"{name}s"), ids=lambda v: str(v).removeprefix("torch.")
            )


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors, and workers that share the cores: a test that wants threads asks for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
