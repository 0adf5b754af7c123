"""A site's own noise: twice the clipping bound is what one site can change, and the noise is a multiple of that."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.mechanisms import distributed, local
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.discrete_gaussian import MAX_SIGMA


def entropy(n=0):
    return Entropy(key=bytes([n]) * 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise_multiplier", "bound"), [(0.5, 1.0), (1.0, 0.3), (4.0, 10.0), (20.0, 1.0)]
)
def test_the_variance_is_that_of_twice_the_bound(noise_multiplier, bound):
    size = 200_000
    actual = local.noised(np.zeros(size), bound, noise_multiplier, entropy())
    wanted = (noise_multiplier * 2 * bound) ** 2
    # Of a Gaussian's squares: the variance's standard error is sqrt(2 / n) of it.
    error = wanted * math.sqrt(2 / size)
    # Rounding adds a little, which is accounted for.
    grid = local.steps(noise_multiplier, size)
    excess = (distributed.sensitivity(size, grid) / grid) ** 2
    assert 1 < excess < 1.0021
    assert abs(actual.var() - wanted * excess) < 3 * error
    assert abs(actual.mean()) < 4 * math.sqrt(wanted / size)
    # The failing twin: noise for a sensitivity of C, as if a site were added and not replaced.
    assert abs(actual.var() - wanted / 4) > 100 * error


def test_at_a_real_network_s_size_rounding_costs_nothing_to_speak_of():
    sd = local.stddev(1.0, 5_000) / local.steps(1.0, 5_000)
    assert 2 <= sd < 2 * 1.001


@pytest.mark.parametrize("noise_multiplier", [0.02, 1.0, 3.0, 60.0])
@pytest.mark.parametrize("size", [1, 100, 1_000_000])
def test_the_grid_is_fine_enough_for_the_accountant_and_the_table(noise_multiplier, size):
    noise_stddev = local.stddev(noise_multiplier, size)
    assert distributed.MIN_STDDEV <= noise_stddev <= MAX_SIGMA
    grid = local.steps(noise_multiplier, size)
    assert grid <= distributed.STEPS
    # What two sites' updates can be apart, and what it is accounted with.
    assert noise_stddev / (2 * distributed.sensitivity(size, grid)) == pytest.approx(
        noise_multiplier
    )


@pytest.mark.parametrize("noise_multiplier", [1e-4, 1e4])
def test_noise_off_the_grid_is_refused(noise_multiplier):
    with pytest.raises(ValueError, match="noise: must be 1000 to 1.04858e"):
        local.stddev(noise_multiplier, 10**9 if noise_multiplier > 1 else 10)


def test_what_leaves_is_a_whole_number_of_steps():
    draw = np.random.default_rng(0)
    update = draw.normal(size=1000) * 1e-3
    actual = local.noised(update, 0.7, 1.3, entropy()) / (0.7 / local.steps(1.3, 1000))
    assert np.array_equal(actual, np.rint(actual)) or abs(actual - np.rint(actual)).max() < 1e-6
    assert np.unique(np.rint(actual)).size > 900


def test_a_long_update_is_scaled_down_and_a_short_one_is_not():
    direction = np.zeros(4)
    direction[1] = 1.0

    def mean(length):
        made = [local.noised(direction * length, 1.0, 0.02, source) for _ in range(400)]
        return np.mean(made, axis=0)

    source = entropy()
    error = 0.04 / math.sqrt(400)
    assert abs(mean(1e6) - direction).max() < 4 * error
    assert abs(mean(0.5) - direction / 2).max() < 4 * error


@pytest.mark.slow
def test_two_sites_are_as_hard_to_tell_apart_as_is_charged():
    # The farthest that two updates can be: C one way, C the other. The best test is a threshold.
    source, noise_multiplier, count = entropy(), 1.0, 4000
    both = [
        np.array(
            [local.noised(np.array([way]), 1.0, noise_multiplier, source) for _ in range(count)]
        )
        for way in (1.0, -1.0)
    ]
    factor, delta = math.exp(epsilon([Release(noise_multiplier)], 0.05)), 0.05

    def told_apart(values):
        """By how much the claim is exceeded, at the best threshold."""
        shares = [[(v > at).mean() for v in values] for at in np.linspace(-6, 6, 61)]
        return max(here - factor * there - delta for here, there in shares)

    assert told_apart(both) < 0.03
    # The failing twin: what noise for C would be, half of it, breaks the same claim.
    halves = [way + (v - way) / 2 for way, v in zip((1.0, -1.0), both, strict=True)]
    assert told_apart(halves) > 0.1


def weights():
    return {
        "w": np.full((20, 30), 5.0, np.float32),
        "steps": np.asarray(7, np.int64),
        "b": np.full(30, -3.0, np.float64),
    }


def test_weights_move_by_the_noised_update_alone():
    received = weights()
    trained = {k: a + np.asarray(1, a.dtype) for k, a in received.items()}
    actual = local.noised_weights(received, trained, 1.0, 0.02, entropy(1))
    assert list(actual) == list(received)
    assert [a.dtype for a in actual.values()] == [a.dtype for a in received.values()]
    assert actual["w"].shape == (20, 30)
    # No noise covers whole numbers: they stay.
    assert actual["steps"] == 7
    moved = np.concatenate([(actual[k] - received[k]).ravel() for k in ("w", "b")])
    # 630 ones, scaled down to a norm of 1 all together.
    assert abs(moved.mean() - 1 / math.sqrt(630)) < 4 * 0.04 / math.sqrt(630)
    assert np.array_equal(received["w"], weights()["w"])
    again = local.noised_weights(received, trained, 1.0, 0.02, entropy(2))
    assert not np.array_equal(again["w"], actual["w"])


def test_that_a_site_had_no_examples_does_not_show():
    received = weights()
    actual = local.noised_weights(received, None, 1.0, 2.0, entropy())
    assert actual["w"].std() == pytest.approx(4.0, rel=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_counts_as_zero(bad):
    received = weights()
    trained = received | {"b": np.full(30, bad)}
    actual = local.noised_weights(received, trained, 1.0, 1.0, entropy())
    same = local.noised_weights(received, received, 1.0, 1.0, entropy())
    assert all(np.array_equal(a, same[name]) for name, a in actual.items())


@pytest.mark.parametrize("size", [1, 50, 5_000])
def test_the_noise_s_norm_stays_within_what_the_gate_allows(size):
    largest = local.max_update_norm(0.5, 2.0, size)
    source = entropy()
    norms = [np.linalg.norm(local.noised(np.zeros(size), 0.5, 2.0, source)) for _ in range(200)]
    assert max(norms) < largest
    # And the gate is no open door: within a few standard deviations of the usual norm.
    assert largest < 2.01 * (math.sqrt(size) + 8)
