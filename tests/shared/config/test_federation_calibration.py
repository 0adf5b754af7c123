"""``[calibration]``: off by default, and refused where nobody may tell figures."""

from __future__ import annotations

import pytest

from fedge.shared.config import reader
from fedge.shared.errors import ConfigError


def tree(privacy=None, **keys):
    given = {"task": {"name": "digits"}, "calibration": {"enabled": True, **keys}}
    return reader.from_tree({**given, **({"privacy": privacy} if privacy else {})})


def test_it_is_off_unless_it_is_asked_for():
    assert not reader.from_tree({"task": {"name": "digits"}}).calibration.enabled
    assert tree().calibration.enabled


@pytest.mark.parametrize(
    "keys",
    [
        {"examples": 63},
        {"examples": 10**6},
        {"bound": 0.0},
        {"bound": 20_000.0},
        {"deadline": 0},
        {"quantile": 0.8},
        {"quantile": 1.1},
    ],
)
def test_values_beyond_their_range_are_refused(keys):
    with pytest.raises(ConfigError, match="calibration") as caught:
        tree(**keys)
    assert caught.value.code == 201


def test_where_metrics_are_off_there_is_no_calibration():
    section = {"mechanism": "local", "noise-multiplier": 1.0}
    with pytest.raises(
        ConfigError, match=r"calibration.enabled: must be false with privacy.metrics off"
    ):
        tree(section)
    assert tree({**section, "metrics": "unprotected"}).calibration.enabled
    noised = {**section, "metrics": "noised", "metrics-noise-multiplier": 1.0}
    assert tree(noised).calibration.enabled
    # Where there is no mechanism, metrics leave as they are, and so do ranges.
    assert tree({"mechanism": "off"}).calibration.enabled


def test_extremes_in_the_clear_have_no_quantile():
    with pytest.raises(ConfigError, match=r"calibration.quantile: must be 1 without"):
        tree(quantile=0.99)
    noised = {"mechanism": "local", "noise-multiplier": 1.0, "metrics": "noised"}
    assert (
        tree({**noised, "metrics-noise-multiplier": 1.0}, quantile=0.99).calibration.quantile
        == 0.99
    )
