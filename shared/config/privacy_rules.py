"""What of a configuration cannot be had under differential privacy, or would break its promise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fedge.shared.config.privacy import CENTRAL
from fedge.shared.config.sections import Sections
from fedge.shared.config.strategies import COMPARING, QFedAvg, Scaffold

_MIN_CENTRAL: Final = 1e-6


def incompatible(config: Sections) -> Iterator[str]:
    """One text for each key that cannot be as it is: what it must be, why, and what it is."""
    if config.privacy.mechanism == "off":
        return
    yield from _strategy_problems(config)
    yield from _secure_aggregation_problems(config)
    yield from _cohort_problems(config)
    if config.calibration.enabled and config.privacy.metrics == "off":
        yield (
            "calibration.enabled: must be false with privacy.metrics off, as ranges and scores are figures over the"
            " sites' examples like metrics, got true"
        )
    if config.privacy.mechanism == "example" and config.train.mixed_precision != "off":
        yield (
            "train.mixed-precision: must be off under differential privacy, as noise is added in full"
            f" precision, got {config.train.mixed_precision}"
        )
    separation = config.privacy.min_separation
    if separation > config.run.rounds:
        yield (
            f"privacy.min-separation: must be at most run.rounds, {config.run.rounds}, as some sites would never be"
            f" asked, got {separation}"
        )
    if (bands := config.privacy.bands) and bands > config.run.rounds:
        yield f"privacy.bands: must be at most run.rounds, {config.run.rounds}, got {bands}"


def _strategy_problems(config: Sections) -> Iterator[str]:
    strategy, mechanism = config.strategy, config.privacy.mechanism
    if isinstance(strategy, QFedAvg):
        yield (
            "strategy.name: must not weigh by losses under differential privacy,"
            " got QFedAvg, whose sites send their exact loss"
        )
    if isinstance(strategy, Scaffold):
        yield (
            "strategy.name: must not send more than weights under differential privacy,"
            " got Scaffold, whose control variates are gradients without noise"
        )
    if isinstance(strategy, COMPARING):
        if mechanism == "distributed":
            yield (
                "strategy.name: must add replies with distributed noise, which is made for one sum over all"
                f" sites, got {strategy.name}"
            )
        if mechanism in CENTRAL:
            yield (
                f"strategy.name: must add replies with {mechanism}, as it is the sum that one site can change by the"
                f" clipping bound at most, got {strategy.name}"
            )


def _secure_aggregation_problems(config: Sections) -> Iterator[str]:
    secure, privacy = config.secure_aggregation, config.privacy
    if privacy.mechanism == "distributed":
        if not secure.enabled:
            yield (
                "secure-aggregation.enabled: must be true with distributed noise, of which each site adds a part"
                " that protects nobody by itself, got false"
            )
        if privacy.corrupt_sites >= secure.min_sites:
            yield (
                "privacy.corrupt-sites: must be below secure-aggregation.min-sites,"
                f" {secure.min_sites}, got {privacy.corrupt_sites}"
            )
    elif secure.enabled and privacy.mechanism in CENTRAL:
        yield (
            f"privacy.mechanism: must be distributed or example with secure-aggregation, got {privacy.mechanism},"
            " by which the server scales down single updates, of which it then sees none"
        )
    elif secure.enabled and privacy.mechanism == "local":
        yield (
            "privacy.mechanism: must be distributed or example with secure-aggregation, got local: with all of each"
            " site's noise in it the sum would have far more than it needs"
        )


def _cohort_problems(config: Sections) -> Iterator[str]:
    """Who takes part is the mechanism's to draw."""
    if config.privacy.mechanism not in CENTRAL:
        return
    noise = config.privacy.noise_multiplier
    if noise is not None and noise < _MIN_CENTRAL:
        yield (
            f"privacy.noise-multiplier: must be at least {_MIN_CENTRAL:g} with {config.privacy.mechanism}, as the"
            f" grid of the updates would be too fine for whole numbers, got {noise:g}"
        )
    if config.round.fraction_train != 1:
        yield (
            f"round.fraction-train: must be 1 with {config.privacy.mechanism}, got {config.round.fraction_train:g}:"
            " a sample of a fixed size is another mechanism with another epsilon; set privacy.sampling-rate"
        )
    chosen = config.privacy.sampling_rate < 1 or config.privacy.min_separation > 1
    if config.round.require_sites and chosen:
        yield (
            "round.require-sites: must be empty where sites are drawn or take turns, got"
            f" {', '.join(config.round.require_sites)[:200]}"
        )
