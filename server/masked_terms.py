"""What a run with distributed noise has cost a site that was in all of it, as the server can reckon it.

Each attempt at a sum is a release of its own at every site that is in it, whether or not the sum is opened. The server
knows how many attempts there were, and the noise is in the configuration; so it knows the most that this run alone can
have cost a site. Nobody is sampled, so that it is the same against the model's readers and against the server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from fedge.server.central_terms import DELTA
from fedge.shared.privacy.accounting import Release
from fedge.shared.privacy.reckoning import reckon
from fedge.shared.privacy.section import PrivacySection

#: Of a round's line.
KEY: Final = "masked_epsilon"


def spent(
    section: PrivacySection, before: Mapping[str, Any], updates: int, evaluations: int
) -> dict[str, float | None]:
    """Epsilon of a run up to a round, as its line tells it.

    Args:
        section: with distributed noise.
        before: what this gave for the round before; empty at the first.
        updates: attempts at the round's sum of updates.
        evaluations: likewise, of noised counters.

    Returns:
        ``delta``, ``consumers`` and ``sample_known`` as in a line's ``central``, None standing for infinity; and how
        many attempts that is of, ``updates`` and ``evaluations``, since the run began.
    """
    updates += int(before.get("updates", 0))
    evaluations += int(before.get("evaluations", 0))
    releases = [
        Release(noise, steps=steps)
        for noise, steps in (
            (section.noise_multiplier, updates),
            (section.metrics_noise_multiplier, evaluations),
        )
        if noise is not None and steps
    ]
    consumers, server = (
        e if math.isfinite(e) else None for e in reckon(releases, DELTA, section.unit)
    )
    return {
        "delta": DELTA,
        "consumers": consumers,
        "sample_known": server,
        "updates": updates,
        "evaluations": evaluations,
    }
