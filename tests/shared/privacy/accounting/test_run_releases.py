"""What a site pays for a run under the server's noise."""

from __future__ import annotations

from functools import partial

import builders
import pytest

from fedge.shared.config.privacy import PrivacySection
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.accounting.run_releases import RunReleases, run_releases

section = partial(builders.section, PrivacySection, noise_multiplier=2.0)


def test_a_sampled_run_is_paid_for_whole_as_rounds_without_the_site_hide_those_with_it():
    one = section(mechanism="central", **{"sampling-rate": 0.1})
    assert run_releases(one, 100) == RunReleases(Release(2.0, 0.1, 100), once=True)


def test_without_sampling_each_round_is_paid_for():
    assert run_releases(section(mechanism="central"), 100) == RunReleases(Release(2.0), once=False)


def test_correlated_noise_is_one_release():
    assert run_releases(section(mechanism="central-mf"), 100) == RunReleases(
        Release(2.0), once=True
    )


def test_without_noise_there_are_no_terms():
    with pytest.raises(ValueError, match="noise-multiplier"):
        run_releases(PrivacySection(), 10)
