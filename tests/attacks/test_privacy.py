"""Each attack on what noise, budget, policy and documents promise; the one on counters at 10, 100 and 1 000 sites."""

from __future__ import annotations

import pytest

from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.mechanisms.csprng import Entropy

from .privacy import (
    CHARGED,
    DELTA,
    PRIVACY,
    TRIALS,
    excess,
    flower_dealer,
    flower_local_dp,
    in_limbs,
    in_one_element,
    sent_by_sites,
)
from .promises import OVERFLOWS, PROMISES, another_vector_of_the_same_checksum

#: By chance alone, the frequency of an event in as many trials is further from its probability once in 10 000 tests.
CHANCE = 4 * 0.5 / TRIALS**0.5


@pytest.mark.parametrize(
    "attack", (*PRIVACY, *OVERFLOWS), ids=lambda a: a.__name__.replace("_", "-")
)
def test_refused(attack, tmp_path):
    outcome = attack(tmp_path)
    assert outcome.name == attack.__name__.replace("_", "-")
    assert outcome.verdict == "refused", outcome


@pytest.mark.slow
@pytest.mark.parametrize("attack", PROMISES, ids=lambda a: a.__name__.replace("_", "-"))
def test_other_promises(attack, tmp_path):
    outcome = attack(tmp_path)
    assert outcome.name == attack.__name__.replace("_", "-")
    # The checksum is against damage alone, as its page and its code say.
    expected = "succeeds" if attack is another_vector_of_the_same_checksum else "refused"
    assert outcome.verdict == expected, outcome


def test_what_is_charged_for_one_release():
    assert epsilon([Release(1.0)], DELTA) == pytest.approx(CHARGED, abs=1e-3)


@pytest.mark.parametrize("sites", [10, 100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_site_at_0_and_one_at_a_half_cannot_be_told_apart(sites):
    random = Entropy(key=bytes([sites % 251]) * 32)
    zero, half = (sent_by_sites(sites, victim, random) for victim in (0.0, 0.5))
    assert excess(in_one_element, zero, half) < CHANCE
    # The failing twin: the very same vectors, opened limb by limb.
    if sites >= 100:
        assert excess(in_limbs, zero, half) > 0.3


def test_flower_s_sum_is_silently_wrong_where_a_dealer_lies():
    assert flower_dealer() == (
        "nobody raises, and the sum is wrong by more than a million quantisation steps"
    )


def test_flower_s_local_noise_leaves_sizes_and_metrics_as_they_are():
    assert flower_local_dp().startswith("LocalDpMod adds noise to the weights alone: 130 examples")
