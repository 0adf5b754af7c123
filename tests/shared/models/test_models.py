import pytest
import torch
from torch import nn

from fedge.shared.models.cnn import CNN
from fedge.shared.models.fnn import FNN
from fedge.shared.models.logistic import LogisticRegression


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("network", "shape", "logits"),
    [
        (CNN(channels=1, side=8, classes=10), (1, 8, 8), 10),
        (CNN(channels=3, side=32, classes=43, width=8, hidden=16), (3, 32, 32), 43),
        (FNN((30, 32, 16, 1)), (30,), 1),
        (FNN((4, 3)), (4,), 3),
        (LogisticRegression(13), (13,), 1),
        (LogisticRegression(5, logits=3), (5,), 3),
    ],
)
@pytest.mark.parametrize("batch", [1, 7])
def test_shapes(network, shape, logits, batch):
    assert network(torch.rand(batch, *shape)).shape == (batch, logits)


def test_the_digits_network_is_small_enough_for_a_device():
    assert 10_000 <= count(CNN(channels=1, side=8, classes=10)) <= 40_000


def test_an_example_does_not_see_its_batch():
    # Group normalisation, unlike batch normalisation, holds for single examples in training too.
    network = CNN(channels=1, side=8, classes=10).train()
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(network(x)[:1], network(x[:1]))
    assert not list(network.buffers())


def test_fnn_ends_in_a_linear_layer():
    assert [type(layer) for layer in FNN((2, 3, 4)).layers] == [nn.Linear, nn.ReLU, nn.Linear]


def test_logistic_regression_is_linear():
    network = LogisticRegression(13)
    assert count(network) == 14
    x, y = torch.rand(2, 4, 13)
    torch.testing.assert_close(
        network(x + y) + network(torch.zeros(4, 13)), network(x) + network(y)
    )
