"""The bound finds the median of the norms from below and above, with noise; with the sign inverted it does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from fedge.shared.privacy.mechanisms.adaptive_clipping import (
    MAX_COUNT_NOISE,
    noise_multiplier_of_updates,
    noisy_fraction,
    update,
)
from fedge.shared.privacy.mechanisms.csprng import Entropy

KEY = bytes(range(32))
SITES = 1000


def inverted(clipping_bound: float, fraction_below: float) -> float:
    """The rule as Flower 1.41 and 1.42 have it."""
    return clipping_bound * math.exp(0.2 * (fraction_below - 0.5))


def follow(start: float, rule: Callable[[float, float], float], quantile_shift: float = 0) -> float:
    """200 rounds on lognormal norms of median 1."""
    generator, entropy = np.random.default_rng(7), Entropy(key=KEY)
    bound = start
    for _ in range(200):
        norms = np.exp(generator.standard_normal(SITES) + quantile_shift)
        bits = int((norms <= bound).sum())
        bound = rule(bound, noisy_fraction(bits, SITES, 10.0, entropy))
    return bound


@pytest.mark.parametrize("start", [0.1, 5.0])
def test_it_converges_to_the_median(start: float) -> None:
    assert follow(start, update) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("quantile", [0.2, 0.8])
def test_it_converges_to_another_quantile(quantile: float) -> None:
    actual = follow(1.0, lambda bound, fraction: update(bound, fraction, quantile))
    assert actual == pytest.approx(math.exp(stats.norm.ppf(quantile)), rel=0.1)


def test_with_the_sign_inverted_it_collapses() -> None:
    assert follow(0.1, inverted) == pytest.approx(2e-10, rel=0.2)
    assert follow(5.0, inverted) > 1e6


def test_one_step() -> None:
    assert update(2.0, 0.5) == 2.0
    assert update(2.0, 1.0) == pytest.approx(2 * math.exp(-0.1))
    assert update(2.0, 0.0) == pytest.approx(2 * math.exp(0.1))
    assert update(2.0, 1.3, 0.9, 1.0) == pytest.approx(2 * math.exp(-0.4))


def test_the_noise_of_the_updates() -> None:
    """Andrew et al., theorem 1: z^-2 = z_updates^-2 + (2 sigma_b)^-2."""
    assert noise_multiplier_of_updates(1.0, 5.0) == pytest.approx((1 - 0.01) ** -0.5)
    for z, sigma in ((0.3, 1.0), (1.0, 0.6), (4.0, 2.1), (1.0, 1e6)):
        updates = noise_multiplier_of_updates(z, sigma)
        assert updates > z or sigma == 1e6
        assert updates**-2 + (2 * sigma) ** -2 == pytest.approx(z**-2, rel=1e-12)


@pytest.mark.parametrize(
    ("z", "sigma"), [(2.0, 1.0), (2.0, 0.5), (1.0, 0.0), (1.0, -3.0), (1.0, math.nan)]
)
def test_bits_that_cost_as_much_as_the_round_are_refused(z: float, sigma: float) -> None:
    with pytest.raises(
        ValueError, match=r"^count_noise_multiplier: must be above noise_multiplier / 2"
    ):
        noise_multiplier_of_updates(z, sigma)


@pytest.mark.parametrize("z", [0.0, -1.0, math.nan, math.inf])
def test_a_noise_multiplier_out_of_range_is_refused(z: float) -> None:
    with pytest.raises(ValueError, match=r"^noise_multiplier: must be above 0"):
        noise_multiplier_of_updates(z, 5.0)


@pytest.mark.parametrize("sigma", [0.5, 3.0, 50.0])
def test_the_fraction_has_the_noise_that_it_says(sigma: float) -> None:
    entropy, size = Entropy(key=KEY), 4000
    actual = np.array([noisy_fraction(30, 100, sigma, entropy) for _ in range(size)])
    assert abs(actual.mean() - 0.3) < 3 * sigma / 100 / math.sqrt(size)
    assert abs(actual.var() / (sigma / 100) ** 2 - 1) < 3 * math.sqrt(2 / size)
    assert stats.kstest((actual - 0.3) * 100 / sigma, "norm").pvalue > 1e-3
    # The failing twin: noise of twice that, as without the halved sensitivity.
    assert stats.kstest((actual - 0.3) * 200 / sigma, "norm").pvalue < 1e-3


def test_it_may_lie_outside_0_and_1() -> None:
    entropy = Entropy(key=KEY)
    actual = [noisy_fraction(0, 10, 20.0, entropy) for _ in range(100)]
    assert min(actual) < 0
    assert max(actual) > 1


def test_under_poisson_sampling_one_site_more_changes_it_by_half_a_share() -> None:
    """Whatever its bit; with the real number of sites as the divisor it would depend on the others' bits."""
    base = noisy_fraction(30, 99, 3.0, Entropy(key=KEY), expected=100)
    for bit in (0, 1):
        with_it = noisy_fraction(30 + bit, 100, 3.0, Entropy(key=KEY), expected=100)
        assert with_it - base == pytest.approx((bit - 0.5) / 100, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 0, 1.0), "sites"),
        ((-1, 10, 1.0), "bits"),
        ((11, 10, 1.0), "bits"),
        ((5, 10, 0.0), "count_noise_multiplier"),
        ((5, 10, math.nan), "count_noise_multiplier"),
        ((5, 10, MAX_COUNT_NOISE * 1.1), "count_noise_multiplier"),
    ],
)
def test_a_fraction_that_cannot_be_is_refused(
    arguments: tuple[int, int, float], named: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{named}: must be "):
        noisy_fraction(*arguments, Entropy())


@pytest.mark.parametrize("expected", [0.0, -1.0, math.inf, math.nan])
def test_an_expected_number_out_of_range_is_refused(expected: float) -> None:
    with pytest.raises(ValueError, match=r"^expected: must be "):
        noisy_fraction(5, 10, 1.0, Entropy(), expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0.0, 0.5), "clipping_bound"),
        ((-1.0, 0.5), "clipping_bound"),
        ((math.inf, 0.5), "clipping_bound"),
        ((1.0, math.nan), "fraction_below"),
        ((1.0, 0.5, 1.1), "target_quantile"),
        ((1.0, 0.5, -0.1), "target_quantile"),
        ((1.0, 0.5, 0.5, 0.0), "learning_rate"),
        ((1.0, 0.5, 0.5, -0.2), "learning_rate"),
        ((1.0, 1e6), "clipping_bound"),
        ((1e-300, 1e3), "clipping_bound"),
    ],
)
def test_an_update_that_cannot_be_is_refused(arguments: tuple[float, ...], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named}: must be "):
        update(*arguments)


def test_the_largest_noise_is_allowed() -> None:
    assert math.isfinite(noisy_fraction(5, 10, 5000.0, Entropy(key=KEY)))


def test_an_empty_sample_has_noise_like_any_other() -> None:
    actual = [
        noisy_fraction(0, 0, 1.0, Entropy(key=bytes([k]) * 32), expected=10) for k in range(99)
    ]
    assert abs(np.mean(actual) - 0.5) < 4 * 0.1 / math.sqrt(99)
    assert np.std(actual) == pytest.approx(0.1, rel=0.3)
    # Without the number that is expected there is nothing to divide by.
    with pytest.raises(ValueError, match="^sites: must be 1 or more"):
        noisy_fraction(0, 0, 1.0, Entropy())
