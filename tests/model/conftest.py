import pytest
import torch

from .models import BASE, KINDS


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors, and workers that share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def ids():
    return torch.randint(0, BASE["vocab_size"], (3, 50), generator=torch.Generator().manual_seed(0))
