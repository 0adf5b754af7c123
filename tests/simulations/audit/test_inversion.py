"""Gradient inversion: a plain update tells the example, a masked and a noised one do not."""

from dataclasses import replace

import numpy as np
import pytest
from builders import config
from torch import nn

from fedge.client.data.dataset import site_shares
from fedge.shared.errors import ConfigError
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.tasks.registry import get_task
from fedge.simulations.audit.inversion import from_gradients, invert


def inverted(name, mechanism="off", network=None, noise=1.0):
    privacy = {"mechanism": mechanism, "statistics": "unprotected"}
    privacy["noise-multiplier"] = None if mechanism == "off" else noise
    masks = {"enabled": mechanism == "distributed"}
    of, task = config(name, privacy=privacy, secure_aggregation=masks, sites=None), get_task(name)
    shares = site_shares(of, task)
    task = replace(task, network=network) if network else task
    return invert(of, task, shares["site-1"], Entropy(key=bytes(32)))


@pytest.mark.parametrize(
    "mechanism", ["off", "example", "distributed", "central", "central-mf", "local"]
)
def test_a_row_of_a_table_is_told_by_a_plain_update_alone(mechanism):
    found = inverted("breast-cancer", mechanism)
    plain, *others = found.views
    assert found.direct
    assert plain.error < 1e-5
    assert np.abs(plain.layer - found.example).max() == plain.error
    assert [v.name for v in others] == ["masked"] + ([mechanism] if mechanism != "off" else [])
    assert all(v.error > 0.1 for v in others)


@pytest.mark.parametrize("mechanism", ["central", "central-mf"])
def test_it_is_the_noise_that_hides_the_row_and_not_the_rest_of_the_mechanism(mechanism):
    found = inverted("breast-cancer", mechanism, noise=1e-5)
    assert found.views[-1].name == mechanism
    assert found.views[-1].error < 0.05


def test_local_noise_that_fits_no_grid_is_not_taken_for_the_networks_fault():
    with pytest.raises(ConfigError, match="privacy: noise: must be") as caught:
        inverted("breast-cancer", "local", noise=1e-3)
    assert caught.value.code == 201


@pytest.mark.soak
def test_a_picture_is_told_through_convolutions():
    found = inverted("digits", "example")
    plain, masked, noised = found.views
    assert (found.layer, found.direct) == ("fc1", False)
    assert max(plain.error, plain.example_error) < 1e-5
    assert min(masked.error, noised.error) > 0.1
    assert min(masked.example_error, noised.example_error) > 0.1
    assert plain.example.shape == (64,)


def test_no_linear_layer_has_no_closed_form():
    found = inverted("breast-cancer", network=lambda: nn.Linear(30, 1, bias=False))
    assert "no linear layer with a bias" in found.reason
    assert found.views == ()


def test_a_network_that_trains_on_no_single_example_is_said_to():
    def network():
        return nn.Sequential(nn.BatchNorm1d(30), nn.Linear(30, 1))

    assert "does not train on a single example" in inverted("breast-cancer", network=network).reason


def test_gradients_of_a_layer_are_its_input_times_those_of_the_bias():
    x, slopes = np.array([1.0, -2.0, 3.0]), np.array([0.5, 0.0, -4.0])
    np.testing.assert_allclose(from_gradients(np.outer(slopes, x), slopes), x)
    assert not from_gradients(np.zeros((2, 3)), np.zeros(2)).any()
