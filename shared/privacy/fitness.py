"""Whether a task can be learnt under a mechanism: found out before anybody's data is read."""

from __future__ import annotations

from typing import Final

import torch

from fedge.shared import preprocess
from fedge.shared.errors import ConfigError
from fedge.shared.privacy.section import PrivacySection
from fedge.shared.tasks.task import Task

_UNFIT: Final = 211


def require_fit(section: PrivacySection, task: Task) -> None:
    """Hold a task against the mechanism.

    Raises:
        ConfigError: 211, a layer mixes examples, or the task standardises by statistics without noise.
    """
    if section.mechanism == "off":
        return
    if preprocess.learns(task.preprocessing) and section.statistics == "off":
        raise ConfigError(
            _UNFIT,
            f"privacy.statistics: must be unprotected for {task.name}, which learns mean and deviation of its"
            " columns, got off",
        )
    with torch.random.fork_rng(devices=[]):
        network = task.network()
    # Where it hides whole sites, an update is clipped as a whole, and examples may mix in it.
    if section.unit == "site":
        trained = {name for name, _ in network.named_parameters()}
        state = network.state_dict().items()
        if others := [n for n, t in state if n not in trained and t.is_floating_point()]:
            raise ConfigError(
                _UNFIT,
                f"{task.name}: network must have no state besides its parameters, as no noise covers that,"
                f" got {others[0]}; GroupNorm has none where BatchNorm has some",
            )
        return
    # Only where it is needed: Opacus takes a second to import.
    from opacus.validators import ModuleValidator

    network.train()
    for error in ModuleValidator.validate(network, strict=False):
        raise ConfigError(
            _UNFIT,
            f"{task.name}: network must have layers that keep examples apart, got {str(error)[:200]}",
        )
