"""Devices, and the parameters of the tests that `contract.Contract` gives to every op."""

import pytest

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
def _one_thread(one_thread):
    """Every test here."""
