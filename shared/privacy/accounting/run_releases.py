"""What one site is charged for under noise that the server adds, where it is the whole run that is private."""

from __future__ import annotations

from dataclasses import dataclass

from fedge.shared.config.privacy import PrivacySection
from fedge.shared.privacy.accounting.epsilon import Release


@dataclass(frozen=True)
class RunReleases:
    """What a round of central noise gives out.

    Attributes:
        release: to charge.
        once: it is the run's, charged before a site's first round in it. Sampling hides a site only while no one
            knows its rounds, so that the rounds in which it is not sampled count like the others; and correlated noise
            is one release over all rounds.
    """

    release: Release
    once: bool


def run_releases(section: PrivacySection, rounds: int) -> RunReleases:
    """The terms of a run with central noise.

    Args:
        section: with a mechanism of the server's.
        rounds: of the whole run, 1 or more.

    Raises:
        ValueError: the section has no noise, or there are no rounds.
    """
    if section.noise_multiplier is None:
        raise ValueError("noise-multiplier: must be a number, got none")
    if section.mechanism == "central-mf":
        # The noise is scaled by what all of a site's rounds change together.
        return RunReleases(Release(section.noise_multiplier), once=True)
    if section.sampling_rate < 1:
        release = Release(section.noise_multiplier, section.sampling_rate, rounds)
        return RunReleases(release, once=True)
    return RunReleases(Release(section.noise_multiplier), once=False)
