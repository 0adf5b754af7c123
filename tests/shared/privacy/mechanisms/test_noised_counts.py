"""Counters with noise: as much as is charged, on a grid, right on average, and without the loss."""

from __future__ import annotations

import math

import builders
import numpy as np
import pytest

from fedge.shared.config.privacy import PrivacySection
from fedge.shared.privacy.mechanisms import noised_counts
from fedge.shared.privacy.mechanisms.csprng import Entropy

NAMES = ("correct", "examples", "loss-sum", "positive", "true-positive")
FOUND = {"correct": 60.0, "examples": 80.0, "loss-sum": 1e6, "positive": 20.0, "true-positive": 5.0}


def section(mechanism="example", noise=2.0, **more):
    metrics = {"metrics": "noised", "metrics-noise-multiplier": noise}
    own = {"mechanism": mechanism, "noise-multiplier": 1.0, **metrics, **more}
    return builders.section(PrivacySection, **own)


def sampled(counts, times=4000, exact=FOUND):
    source = Entropy(key=bytes(32))
    results = [counts.make(exact, source) for _ in range(times)]
    return {name: np.array([one[name] for one in results]) for name in counts.reported}


def within(values, mean, stddev):
    n = len(values)
    assert abs(values.mean() - mean) < 4 * stddev / math.sqrt(n)
    assert abs(values.var() - stddev**2) < 3 * stddev**2 * math.sqrt(2 / n)


def test_single_examples_are_hidden_in_every_counter_but_the_loss():
    counts = noised_counts.plan(section(), NAMES)
    assert counts.reported == counts.noised == ("correct", "examples", "positive", "true-positive")
    for name, values in sampled(counts).items():
        # One example changes all four by 1.
        within(values, FOUND[name], 2.0 * math.sqrt(4))


@pytest.mark.parametrize("mechanism", ["local", "central", "central-mf"])
def test_whole_sites_are_hidden_in_shares_and_each_counts_as_one(mechanism):
    counts = noised_counts.plan(section(mechanism), NAMES)
    assert counts.unit == "site"
    assert counts.noised == ("correct", "positive", "true-positive")
    values = sampled(counts)
    assert set(values.pop("examples")) == {1.0}
    for name, shares in values.items():
        within(shares, FOUND[name] / 80, 2.0 * math.sqrt(3))


@pytest.mark.slow
def test_under_masks_the_sites_noise_is_as_much_together():
    counts = noised_counts.plan(section("distributed"), NAMES, honest=5)
    source = Entropy(key=bytes(32))
    sums = np.array(
        [sum(counts.make(FOUND, source)["correct"] for _ in range(5)) for _ in range(2000)]
    )
    within(sums, 5 * 0.75, 2.0 * math.sqrt(3))
    # The failing twin: one site's alone is a fifth of it, and would be charged for too little.
    alone = sampled(counts, 2000)["correct"]
    assert alone.var() < 0.25 * 12


@pytest.mark.parametrize("noise", [0.002, 0.1, 1.0, 30.0, 5000.0])
def test_the_noise_is_on_a_grid_that_is_fine_enough(noise):
    counts = noised_counts.plan(section("local", noise), NAMES)
    steps = 2**counts.bits
    assert 0 <= counts.bits <= noised_counts.MAX_BITS
    assert counts.stddev * steps >= 1000
    for value in counts.make(FOUND, Entropy()).values():
        assert (value * steps).is_integer()


def test_noise_below_the_grid_is_refused():
    counts = noised_counts.plan(section("local", 1e-5), NAMES)
    with pytest.raises(ValueError, match="noise on counters: must be"):
        counts.make(FOUND, Entropy())


def test_a_site_s_shares_stay_within_0_and_1_before_the_noise():
    # A task that counts wrongly must not move a mean by more than is hidden.
    counts = noised_counts.plan(section("local", 0.01), NAMES)
    odd = FOUND | {"correct": 1e9, "positive": -5.0}
    values = sampled(counts, 200, odd)
    assert abs(values["correct"].mean() - 1) < 0.01
    assert abs(values["positive"].mean()) < 0.01


def test_a_site_without_examples_is_noise_alone():
    nothing = dict.fromkeys(NAMES, 0.0)
    values = sampled(noised_counts.plan(section("local"), NAMES), exact=nothing)
    within(values["correct"], 0.0, 2.0 * math.sqrt(3))
    assert set(values["examples"]) == {1.0}


@pytest.mark.parametrize("name", ["correct", "examples"])
def test_counters_that_are_not_finite_are_refused(name):
    counts = noised_counts.plan(section(), NAMES)
    with pytest.raises(ValueError, match="counters: must be finite"):
        counts.make(FOUND | {name: math.nan}, Entropy())


@pytest.mark.parametrize(
    "off",
    [
        {"metrics": "off"},
        {"metrics": "unprotected"},
    ],
)
def test_counters_without_noise_are_none_of_this(off):
    given = {"mechanism": "local", "noise-multiplier": 1.0, **off}
    assert noised_counts.plan(PrivacySection.model_validate(given), NAMES) is None


def test_a_task_with_the_loss_alone_still_tells_how_many():
    counts = noised_counts.plan(section("local"), ("examples", "loss-sum"))
    assert counts.make(FOUND, Entropy()) == {"examples": 1.0}
