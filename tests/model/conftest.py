import pytest
import torch

from .models import BASE, KINDS


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Every test here."""


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def ids():
    return torch.randint(0, BASE["vocab_size"], (3, 50), generator=torch.Generator().manual_seed(0))
