"""What a configuration with noise of the server's says of a run: what it costs, and what of it is secret."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from fedge.shared.config.privacy import PrivacySection
from fedge.shared.privacy.accounting import epsilon
from fedge.shared.privacy.accounting.adversaries import account
from fedge.shared.privacy.accounting.epsilon import Release


def is_secret_sample(section: PrivacySection) -> bool:
    """Whether epsilon rests on nobody's knowing who was drawn."""
    return section.mechanism == "central" and section.sampling_rate < 1


def noise_multiplier_of(section: PrivacySection) -> float:
    """The section's.

    Raises:
        ValueError: it has none.
    """
    if section.noise_multiplier is None:
        raise ValueError("noise-multiplier: must be a number, got none")
    return section.noise_multiplier


def central_spent(
    section: PrivacySection, server_round: int, evaluations: int = 0
) -> dict[str, float | None]:
    """Epsilon of a run up to a round, for the model's consumers, and for those who also learn which sites were sampled.

    Args:
        section: with a mechanism of the server's.
        server_round: the last one.
        evaluations: of the run up to it, which every site answers.

    Correlated noise is one release over all rounds, so that its epsilon is there from the first on. None stands for
    infinity, which JSON does not have.
    """
    multiplier = noise_multiplier_of(section)
    if section.mechanism == "central-mf":
        releases = [Release(multiplier)]
    else:
        releases = [Release(multiplier, section.sampling_rate, server_round)]
    if section.metrics_noise_multiplier is not None and evaluations:
        releases.append(Release(section.metrics_noise_multiplier, steps=evaluations))
    found = {
        "consumers": epsilon.epsilon(releases, section.delta),
        "sample_known": epsilon.epsilon(epsilon.unamplified(releases), section.delta),
    }
    return {
        "delta": section.delta,
        **{k: e if math.isfinite(e) else None for k, e in found.items()},
    }


#: Of a round's line.
KEY: Final = "masked_epsilon"


def masked_spent(
    section: PrivacySection, before: Mapping[str, Any], updates: int, evaluations: int
) -> dict[str, float | None]:
    """Epsilon of a run up to a round, as its line tells it.

    Args:
        section: with distributed noise.
        before: what this gave for the round before; empty at the first.
        updates: attempts at the round's sum of updates.
        evaluations: the same for noised counters.

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
        e if math.isfinite(e) else None for e in account(releases, section.delta, section.unit)
    )
    return {
        "delta": section.delta,
        "consumers": consumers,
        "sample_known": server,
        "updates": updates,
        "evaluations": evaluations,
    }
