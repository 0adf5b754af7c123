"""Epsilon of many releases together, against either reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeAlias

from fedge.shared.privacy import accounting
from fedge.shared.privacy.accounting import Release
from fedge.shared.privacy.charges import Unit, check_delta

#: Noise multiplier, sampling rate, fixed size, steps.
Part: TypeAlias = tuple[float, float, bool, int]


def reckon(releases: Iterable[Release], delta: float, unit: Unit) -> tuple[float, float]:
    """Epsilon of these releases together, against the model's consumers and against the server.

    The server sees which sites are sampled, so for it sampling hides no site. Which examples a site draws it sees as
    little as anybody else: single examples are hidden from both alike.

    Raises:
        ValueError: ``delta`` is not within (0, 1).
    """
    return reckon_parts(map(part_of, releases), delta, unit)


def reckon_parts(parts: Iterable[Part], delta: float, unit: Unit) -> tuple[float, float]:
    """As ``reckon``, of releases as the ledger keeps them."""
    check_delta(delta)
    together = _merged(parts)
    # Accounting keeps what it has composed, so that a charge of a known kind costs little.
    consumers = accounting.epsilon(together, delta)
    if unit == "example":
        return consumers, consumers
    return consumers, accounting.epsilon(accounting.unamplified(together), delta)


def part_of(release: Release) -> Part:
    """A release as the ledger keeps it."""
    return release.noise_multiplier, release.sampling_rate, release.fixed_size, release.steps


def _merged(parts: Iterable[Part]) -> list[Release]:
    """Releases of the same parameters as one."""
    steps: Counter[tuple[float, float, bool]] = Counter()
    for noise_multiplier, sampling_rate, fixed_size, number in parts:
        steps[noise_multiplier, sampling_rate, fixed_size] += number
    return [Release(noise, rate, n, fixed) for (noise, rate, fixed), n in steps.items()]
