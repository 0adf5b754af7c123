"""What distributed noise comes to: every attempt is a release, and so is every evaluation with noise."""

from __future__ import annotations

import math

import pytest

from fedge.server.aggregation.privacy_cost import masked_spent
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.privacy.accounting.epsilon import Release, epsilon

SECTION = PrivacySection.model_validate({"mechanism": "distributed", "noise-multiplier": 4.0})
NOISED = PrivacySection.model_validate(
    {
        "mechanism": "distributed",
        "noise-multiplier": 4.0,
        "metrics": "noised",
        "metrics-noise-multiplier": 8.0,
    }
)


def test_every_attempt_counts():
    first = masked_spent(SECTION, {}, 1, 1)
    assert first["consumers"] == first["sample_known"] == epsilon([Release(4.0)], 1e-5)
    third = masked_spent(SECTION, first, 2, 1)
    assert (third["updates"], third["evaluations"]) == (3, 2)
    assert third["consumers"] == pytest.approx(epsilon([Release(4.0, steps=3)], 1e-5))
    # The failing twin: by rounds it would be two.
    assert third["consumers"] > epsilon([Release(4.0, steps=2)], 1e-5)


def test_evaluations_with_noise_count_too():
    both = epsilon([Release(4.0, steps=2), Release(8.0, steps=3)], 1e-5)
    assert masked_spent(NOISED, {"updates": 1, "evaluations": 2}, 1, 1)[
        "consumers"
    ] == pytest.approx(both)
    assert both > epsilon([Release(4.0, steps=2)], 1e-5)


def test_a_round_without_a_sum_costs_nothing():
    assert masked_spent(NOISED, {}, 0, 0)["consumers"] == 0
    assert math.isfinite(masked_spent(NOISED, {}, 1, 0)["consumers"])
