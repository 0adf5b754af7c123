"""Distributed noise: its variance and distribution over a sum, the norm that is charged for, and room in the ring."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedge.shared.privacy.mechanisms import distributed
from fedge.shared.privacy.mechanisms.csprng import Entropy

KEY = bytes(range(32))


def signed(total):
    return total.view(np.int32).astype(np.int64)


def summed(sites, honest, size=20_000, noise_multiplier=1.0, update=None):
    entropy = Entropy(key=KEY)
    noise_stddev = distributed.stddev(noise_multiplier, size, honest, sites)
    update = np.zeros(size) if update is None else update
    total = np.zeros(size, np.uint32)
    for _ in range(sites):
        total += distributed.encode(update, 2.0, noise_stddev, entropy)
    return signed(total)


@pytest.mark.parametrize(("sites", "honest"), [(5, 5), (8, 5), (1, 1)])
def test_the_sum_over_so_many_sites_has_the_variance_that_is_charged_or_more(sites, honest):
    size = 20_000
    actual = summed(sites, honest)
    sigma = distributed.sensitivity(size) * math.sqrt(sites / honest)
    # The variance of a variance of n normal values is 2 sigma^4 / n.
    assert abs(actual.var() - sigma**2) < 3 * sigma**2 * math.sqrt(2 / size)
    assert abs(actual.mean()) < 4 * sigma / math.sqrt(size)
    assert sigma >= distributed.sensitivity(size)


def test_the_sum_is_as_a_gaussian_and_half_the_noise_is_found_out():
    size = 20_000
    sigma = distributed.sensitivity(size)
    for multiplier, fits in ((1.0, True), (0.9, False)):
        actual = summed(5, 5, noise_multiplier=multiplier)
        edges = stats.norm.ppf(np.linspace(0, 1, 41)[1:-1]) * sigma
        counts = np.bincount(np.searchsorted(edges, actual), minlength=40)
        p = stats.chisquare(counts).pvalue
        assert (p > 1e-3) == fits


def test_updates_add_up_under_the_noise():
    size, sites = 5_000, 400
    update = np.full(size, 2.0 / math.sqrt(size))
    actual = summed(sites, sites, size, 0.4, update) / distributed.steps_a_unit(2.0) / sites
    noise = 0.4 * distributed.sensitivity(size) / distributed.steps_a_unit(2.0) / sites
    assert abs(actual.mean() - update[0]) < 4 * noise / math.sqrt(size)


@pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
def test_a_rounded_update_is_never_longer_than_is_charged_for(size):
    entropy = Entropy(key=KEY)
    rng = np.random.default_rng(size)
    max_norm = distributed.sensitivity(size)
    for _ in range(20):
        exact = rng.standard_normal(size)
        exact *= distributed.STEPS / np.linalg.norm(exact)
        actual = distributed.rounded(exact, max_norm, entropy)
        assert np.abs(actual - exact).max() < 1
        assert np.linalg.norm(actual.astype(float)) <= max_norm


def test_rounding_has_the_right_mean():
    entropy = Entropy(key=KEY)
    exact = np.full(200_000, 0.3)
    assert abs(distributed.rounded(exact, 1e9, entropy).mean() - 0.3) < 5 * 0.46 / math.sqrt(2e5)


def test_the_grid_costs_next_to_nothing():
    """The design's figure: at 10^7 coordinates epsilon 5.2242 where the continuous Gaussian has 5.2224."""
    assert distributed.sensitivity(10**7) / distributed.STEPS == pytest.approx(1.0003, abs=1e-4)
    assert distributed.sensitivity(1) <= distributed.STEPS + 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1.0, 100, 0, 5), "honest sites: must be 1 to 5, got 0"),
        ((1.0, 100, 6, 5), "honest sites: must be 1 to 5, got 6"),
        ((0.01, 100, 5, 5), "noise of one site: must be 1000 to"),
        ((100.0, 100, 5, 5), "noise of one site: must be 1000 to"),
        ((1.0, 100, 5, 40_000), "sum: must stay within"),
        ((1.0, 0, 5, 5), "size: must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        distributed.stddev(*arguments)


@pytest.mark.parametrize("bad", [2.1, math.nan, math.inf])
def test_an_update_that_was_not_clipped_is_refused(bad):
    with pytest.raises(ValueError, match="update: must have an L2 norm of 2 at most"):
        distributed.encode(np.array([bad]), 2.0, 2000.0, Entropy(key=KEY))


def test_each_vector_has_noise_of_its_own():
    entropy = Entropy()
    one, other = (distributed.encode(np.zeros(50), 2.0, 2000.0, entropy) for _ in range(2))
    assert (one != other).any()
