"""Whether a task can be learnt under a mechanism: found out before anybody's data is read."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from fedge.shared.config.privacy import PrivacySection
from fedge.shared.errors import ConfigError
from fedge.shared.preprocessing import steps
from fedge.shared.privacy.mechanisms import distributed, local, noised_counts
from fedge.shared.protocol import MAX_SITES
from fedge.shared.tasks.task import Task

_INCOMPATIBLE: Final = 211
#: Initial weights that are tried before a task is refused. Where a number is at the bend of a ReLU, or two are equal in
#: a max pooling, rounding decides between two gradients; what is wrong with the network is wrong with all weights.
_TRIALS: Final = 3


def require_compatible(section: PrivacySection, task: Task, min_sites: int = 0) -> None:
    """Hold a task against the mechanism.

    Args:
        section: the mechanism.
        task: to learn.
        min_sites: fewest sites of a secure sum; 0 where that is not known yet, and distributed noise is not looked at.

    Raises:
        ConfigError: 211, a layer mixes examples, a parameter's gradients are not by example, the task standardises by
            statistics without noise, or the noise is too little or too much for the grid.
    """
    if section.mechanism == "off":
        return
    if steps.learns(task.preprocessing) and section.statistics == "off":
        raise ConfigError(
            _INCOMPATIBLE,
            f"privacy.statistics: must be unprotected for {task.name}, which fits mean and standard deviation of its"
            " columns, got off",
        )
    network = _built(task, seed=0)
    _require_noise(section, task, network, min_sites)
    # Where it hides whole sites, an update is clipped as a whole, and examples may mix in it.
    if section.unit == "site":
        trained = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        state = network.state_dict().items()
        if others := [n for n, t in state if n not in trained and t.is_floating_point()]:
            raise ConfigError(
                _INCOMPATIBLE,
                f"{task.name}: network must have no state besides its parameters, as no noise protects that,"
                f" got {others[0]}; GroupNorm has none where BatchNorm has some",
            )
        return
    # Only where it is needed: Opacus takes a second to import.
    from opacus.validators import ModuleValidator

    network.train()
    for error in ModuleValidator.validate(network, strict=False):
        raise ConfigError(
            _INCOMPATIBLE,
            f"{task.name}: network must have layers that keep examples apart, got {str(error)[:200]}",
        )
    from fedge.shared.privacy.checks.per_example_gradients import require_apart

    for seed in range(_TRIALS):
        try:
            with torch.random.fork_rng(devices=[]):
                require_apart(task, network if seed == 0 else _built(task, seed).train())
            return
        except ValueError as error:
            fault = error
    raise ConfigError(_INCOMPATIBLE, f"{task.name}: {fault}") from None


def _built(task: Task, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.network()


def _require_noise(section: PrivacySection, task: Task, network: nn.Module, min_sites: int) -> None:
    """Hold the noise against its grid, which depends on the number of weights."""
    honest = 1
    if section.mechanism == "distributed":
        honest = min_sites - section.corrupt_sites
        if honest < 1:
            return
    multiplier = section.noise_multiplier
    size = sum(t.numel() for t in network.state_dict().values() if t.is_floating_point())
    try:
        if section.mechanism == "distributed" and multiplier is not None:
            distributed.stddev(multiplier, size, honest, MAX_SITES)
        if section.mechanism == "local" and multiplier is not None:
            local.stddev(multiplier, size)
        counts = noised_counts.plan(section, task.counter_names, honest)
        if counts is not None:
            counts.require_grid()
    except ValueError as error:
        raise ConfigError(_INCOMPATIBLE, f"privacy: {error}") from None
