"""What the server opens of noised counters tells no more than the accountant allows, however many sites add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import pytest
from numpy.typing import NDArray

from fedge.shared.config.privacy import PrivacySection
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.mechanisms import noised_counts
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.secagg import vector_layout
from fedge.shared.secagg.exact_counters import encode_counters

TRIALS: Final = 300
DELTA: Final = 1e-5
#: Multiplier 1: what one release of this kind is charged.
CHARGED: Final = 4.37718
#: By chance alone, the frequency of an event in 300 trials is further from its probability once in 10 000 tests.
CHANCE: Final = 4 * 0.5 / TRIALS**0.5
#: Of one sum, each a trial of its own.
NAMES: Final = tuple(f"trial-{i}" for i in range(TRIALS))
LAYOUT: Final = vector_layout.of_evaluation(NAMES, noised=True)
SECTION: Final = PrivacySection.model_validate(
    {
        "mechanism": "distributed",
        "clipping-bound": 1.0,
        "noise-multiplier": 1.0,
        "metrics": "noised",
        "metrics-noise-multiplier": 1.0,
    }
)


def in_one_element(sent: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What a server opens: the sums in the ring 2^64; ``(sites, TRIALS)`` becomes ``(TRIALS, 1)``."""
    return sent.sum(axis=0, dtype=np.uint64)[:, None]


def in_limbs(sent: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What a server opened while a counter travelled as limbs of 20 bits, each with a sum of its own."""
    low = np.uint64(2**20 - 1)
    limbs = [sent >> np.uint64(shift) & low for shift in (0, 20, 40)]
    return np.stack([limb.sum(axis=0) for limb in limbs], axis=1)


def sent_by_sites(sites: int, victim: float, entropy: Entropy) -> NDArray[np.uint64]:
    """``(sites, TRIALS)``: all sites but the first hold a half, and each adds its part of the noise."""
    counts = noised_counts.plan(SECTION, NAMES, sites, sensitivity=1.0)
    assert counts is not None
    assert counts.unit == "site"
    found = np.empty((sites, TRIALS), np.uint64)
    for site in range(sites):
        # The first holds one held-out example, of which it has ``victim`` right.
        own = dict.fromkeys(NAMES, 0.5 if site else victim) | {noised_counts.EXAMPLES: 1.0}
        values = vector_layout.task_counters(counts.make(own, entropy))
        found[site] = encode_counters(values, LAYOUT.counters[1:])
    return found


def events(views: NDArray[np.uint64]) -> set[tuple[int, int]]:
    """For each column, each value that it had; few of a carry, many of a sum."""
    return {(c, int(v)) for c in range(views.shape[1]) for v in np.unique(views[:, c])[:50]}


def excess(
    opened: Callable[[NDArray[np.uint64]], NDArray[np.uint64]],
    zero: NDArray[np.uint64],
    half: NDArray[np.uint64],
) -> float:
    """By how much the best event found exceeds what epsilon and delta allow, in probability."""
    one, other = opened(zero), opened(half)
    found = []
    for column, value in events(np.concatenate([one, other])):
        for event in (np.equal, np.less_equal, np.greater):
            p = event(one[:, column], np.uint64(value)).mean()
            q = event(other[:, column], np.uint64(value)).mean()
            found += [p - np.exp(CHARGED) * q - DELTA, q - np.exp(CHARGED) * p - DELTA]
    return float(max(found))


def test_what_is_charged_for_one_release() -> None:
    assert epsilon([Release(1.0)], DELTA) == pytest.approx(CHARGED, abs=1e-3)


@pytest.mark.parametrize("sites", [10, 100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_site_at_0_and_one_at_a_half_cannot_be_told_apart(sites: int) -> None:
    random = Entropy(key=bytes([sites % 251]) * 32)
    zero, half = (sent_by_sites(sites, victim, random) for victim in (0.0, 0.5))
    assert excess(in_one_element, zero, half) < CHANCE
    # The failing twin: the very same vectors, opened limb by limb.
    if sites >= 100:
        assert excess(in_limbs, zero, half) > 0.3
