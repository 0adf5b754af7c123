"""Epsilon of many releases together, against either adversary: the model's consumers, or the server."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from fedge.shared.config.privacy import CENTRAL, Unit
from fedge.shared.privacy.accounting import epsilon
from fedge.shared.privacy.accounting.charges import Entry, check_delta
from fedge.shared.privacy.accounting.epsilon import Release

#: Noise multiplier, sampling rate, fixed size, steps.
Part: TypeAlias = tuple[float, float, bool, int]


def account(releases: Iterable[Release], delta: float, unit: Unit) -> tuple[float, float]:
    """Epsilon of these releases together, against the model's consumers and against the server.

    The server sees which sites are sampled, so for it sampling hides no site. Which examples a site samples it
    does not see any more than others do: single examples are hidden from both alike.

    Args:
        releases: to account for.
        delta: at which epsilon is computed, within (0, 1).
        unit: what the noise hides.

    Returns:
        Epsilon against the model's consumers, and against the server.

    Raises:
        ValueError: ``delta`` is not within (0, 1).
    """
    parts = list(map(part_of, releases))
    return account_parts(parts, [], delta) if unit == "example" else account_parts([], parts, delta)


def of_study(
    kept: Iterable[tuple[Unit, str, Part]], unit: Unit, delta: float
) -> tuple[float, float]:
    """Epsilon of all charges to a privacy budget account (study) for a unit, for whatever purpose they were made.

    The two units have different neighbours. Data sets of the unit ``site`` differ by a site that is there or not: its
    clipped update changes the sum by the clipping bound C. Those of the unit ``example`` differ by one example. By
    DP-SGD that example is there or not, and its clipped gradient changes the sum by C; but within a site whose update
    is clipped as a whole it turns one update into another, which changes the sum by up to 2 C. So noise that hides a
    site with multiplier z hides each of its examples as with z / 2, at the same sampling rate of sites (Balle, Barthe
    and Gaboardi, NeurIPS 2018, theorem 2). What hides single examples bounds nothing for the site, and nothing bounds
    what the server learns from updates to which it adds the noise itself.

    Args:
        kept: unit, mechanism and release of each charge.
        unit: whose epsilon is computed.
        delta: at which epsilon is computed.

    Returns:
        Epsilon against the model's consumers, and against the server.
    """
    every = list(kept)
    examples = [part for hidden, _, part in every if hidden == "example"]
    if unit == "site" and examples:
        return math.inf, math.inf
    sites = [part for hidden, _, part in every if hidden == "site"]
    if unit == "example":
        sites = [(noise / 2, rate, fixed, steps) for noise, rate, fixed, steps in sites]
    consumers, server = account_parts(examples, sites, delta)
    return consumers, math.inf if any(name in CENTRAL for _, name, _ in every) else server


def of_entries(entries: Sequence[Entry], unit: Unit, delta: float) -> tuple[float, float]:
    """As ``of_study``, for the first charges of a study as its ledger holds them; at least one.

    The newest says it already where all are of this unit, and it is of this delta; that takes no accountant. (Of
    entries of both units an older fedge kept a smaller epsilon for single examples.)
    """
    last = entries[-1]
    if last.epsilon_delta == delta and all(entry.charge.unit == unit for entry in entries):
        return last.epsilon_consumers, last.epsilon_server
    kept = ((e.charge.unit, e.charge.mechanism, part_of(e.charge.release)) for e in entries)
    return of_study(kept, unit, delta)


def account_parts(
    of_examples: Iterable[Part], of_sites: Iterable[Part], delta: float
) -> tuple[float, float]:
    """As ``account``, for releases as the ledger keeps them.

    Args:
        of_examples: releases that sample examples, unseen by the server.
        of_sites: releases that sample sites, which the server sees.
        delta: at which epsilon is computed.
    """
    check_delta(delta)
    examples, sites = _merged(of_examples), _merged(of_sites)
    # Accounting keeps what it has composed, so that a charge of a known kind costs little.
    consumers = epsilon.epsilon(_together(examples, sites), delta)
    seen = epsilon.unamplified(sites)
    if seen == sites:
        return consumers, consumers
    return consumers, epsilon.epsilon(_together(examples, seen), delta)


def _together(*releases: list[Release]) -> list[Release]:
    return _merged(part_of(one) for some in releases for one in some)


def part_of(release: Release) -> Part:
    """A release as the ledger keeps it."""
    return release.noise_multiplier, release.sampling_rate, release.fixed_size, release.steps


def _merged(parts: Iterable[Part]) -> list[Release]:
    """Releases of the same parameters as one."""
    steps: Counter[tuple[float, float, bool]] = Counter()
    for noise_multiplier, sampling_rate, fixed_size, number in parts:
        steps[noise_multiplier, sampling_rate, fixed_size] += number
    return [Release(noise, rate, n, fixed) for (noise, rate, fixed), n in steps.items()]
