"""Every family of networks, for tests of the networks and of what is compiled of them."""

import pytest
from network_families import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    import torch

    torch.manual_seed(0)
    return FAMILIES[request.param]
