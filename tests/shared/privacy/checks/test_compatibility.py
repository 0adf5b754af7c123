"""What cannot be learnt under a mechanism: layers that mix examples, or state that no noise covers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedge.shared.config.privacy import PrivacySection
from fedge.shared.errors import ConfigError
from fedge.shared.privacy.checks.compatibility import require_compatible
from fedge.shared.tasks.registry import get_task

OF_SITES = ("distributed", "central", "central-mf", "local")


def privacy_section(mechanism: str) -> PrivacySection:
    values: dict[str, Any] = {"mechanism": mechanism, "noise-multiplier": 1.0}
    return PrivacySection.model_validate(values)


def normed(norm: nn.Module) -> Any:
    return replace(
        get_task("digits"),
        network=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), norm, nn.Linear(8, 10)),
    )


@pytest.mark.parametrize("mechanism", OF_SITES)
def test_state_that_no_noise_covers_is_refused(mechanism: str) -> None:
    with pytest.raises(ConfigError, match="no state besides its parameters") as caught:
        require_compatible(privacy_section(mechanism), normed(nn.BatchNorm1d(8)))
    assert caught.value.code == 211


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)
        self.last = nn.Linear(64, 10)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        actual: torch.Tensor = self.last(self.other(self.one(x.flatten(1)).tanh()))
        return actual


@pytest.mark.parametrize("mechanism", OF_SITES)
def test_tied_weights_are_parameters(mechanism: str) -> None:
    require_compatible(privacy_section(mechanism), replace(get_task("digits"), network=Tied))


@pytest.mark.parametrize("mechanism", OF_SITES)
def test_where_sites_are_hidden_examples_may_mix(mechanism: str) -> None:
    mixing = nn.BatchNorm1d(8, track_running_stats=False)
    require_compatible(privacy_section(mechanism), normed(mixing))
    require_compatible(privacy_section(mechanism), get_task("digits"))


def test_where_examples_are_hidden_they_may_not() -> None:
    with pytest.raises(ConfigError, match="keep examples apart"):
        require_compatible(privacy_section("example"), normed(nn.BatchNorm1d(8)))
    require_compatible(PrivacySection(), normed(nn.BatchNorm1d(8)))


@pytest.mark.parametrize(
    ("values", "min_sites", "says"),
    [
        ({"mechanism": "distributed"}, 5, None),
        # So little for each of so many sites that the discrete Gaussian would differ.
        ({"mechanism": "distributed", "noise-multiplier": 0.01}, 5, "noise of one site"),
        ({"mechanism": "distributed", "noise-multiplier": 0.01}, 0, None),
        ({"mechanism": "distributed", "noise-multiplier": 1e4}, 5, "noise of one site"),
        ({"mechanism": "local"}, 0, None),
        ({"mechanism": "local", "noise-multiplier": 1e-3}, 0, "noise: must be 1000"),
        (
            {"mechanism": "local", "metrics": "noised", "metrics-noise-multiplier": 1e-5},
            0,
            "noise on counters",
        ),
        (
            {"mechanism": "example", "metrics": "noised", "metrics-noise-multiplier": 1.0},
            0,
            None,
        ),
    ],
)
def test_noise_that_fits_no_grid_is_refused(
    values: dict[str, Any], min_sites: int, says: str | None
) -> None:
    section = PrivacySection.model_validate({"noise-multiplier": 1.0, **values})
    if says is None:
        require_compatible(section, get_task("digits"), min_sites)
        return
    with pytest.raises(ConfigError, match=says) as caught:
        require_compatible(section, get_task("digits"), min_sites)
    assert caught.value.code == 211
