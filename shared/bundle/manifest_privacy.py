"""A manifest's record of differential privacy: the run's settings, not the epsilon that it spent.

The cost of a run follows from several numbers, and only the sites' ledgers know the total. So a manifest holds the
parameters for accounting it, and which values left the sites without noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_TEXTS: Final = {
    "unit": ("example", "site"),
    "metrics": ("off", "noised", "unprotected"),
    "statistics": ("off", "unprotected"),
}
#: Keys that only one mechanism has.
_MECHANISM_OF_KEY: Final = {
    "sampling_rate": "central",
    "min_separation": "central-mf",
    "corrupt_sites": "distributed",
}


@dataclass(frozen=True)
class Privacy:
    """Differential privacy under which a model was trained.

    Attributes:
        mechanism, clipping_bound: of the run.
        noise_multiplier: of the run; None where each site calibrated its own for ``epsilon``.
        ledgers: by site, SHA-256 of its privacy ledger after its last round, which holds the epsilon spent.
        epsilon, delta: the target that each site set its noise for; None beside a noise multiplier.
        unit: unit of privacy, ``"example"`` or ``"site"``.
        sampling_rate: probability that a site is sampled in a round (central).
        min_separation: rounds between two participations of a site (central-mf).
        corrupt_sites: tolerated number of sites in a sum that add no noise (distributed).
        metrics: ``"off"``, no evaluation; ``"noised"``; ``"unprotected"``, counts left the sites without noise.
        metrics_noise_multiplier: of noised metrics, relative to the sensitivity of the counts.
        statistics: ``"off"``; ``"unprotected"``, mean and standard deviation left the sites without noise.

    All from ``unit`` on are None in manifests that older versions wrote.
    """

    mechanism: str
    noise_multiplier: float | None
    clipping_bound: float
    ledgers: Mapping[str, str]
    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    sampling_rate: float | None = None
    min_separation: int | None = None
    corrupt_sites: int | None = None
    metrics: str | None = None
    metrics_noise_multiplier: float | None = None
    statistics: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; what is None has no key."""
        present = {key: value for key, value in vars(self).items() if value is not None}
        return {**present, "ledgers": dict(self.ledgers)}

    def words(self) -> str:
        """The record as one line of text; missing values are named, as leaving them out would suggest protection."""
        parts = [self.mechanism]
        # Otherwise the mechanism's name is the unit.
        if self.unit and self.unit != self.mechanism:
            parts.append(f"unit {self.unit}")
        if self.epsilon is None:
            parts.append(f"noise multiplier {self.noise_multiplier:g}")
        else:
            # Noised counts are within it, exact ones are in no epsilon at all.
            scope = "training and metrics" if self.metrics == "noised" else "training"
            parts.append(f"epsilon {self.epsilon:g} at delta {self.delta:g} for {scope}")
        parts.append(f"clipping bound {self.clipping_bound:g}")
        parts += [
            f"{key.replace('_', ' ')} {value:g}"
            for key in _MECHANISM_OF_KEY
            if (value := getattr(self, key)) is not None
        ]
        beside = f"metrics {self.metrics or 'not told'}"
        if self.metrics_noise_multiplier is not None:
            beside += f" with noise multiplier {self.metrics_noise_multiplier:g}"
        if self.statistics == "unprotected":
            beside += ", statistics unprotected"
        return f"{', '.join(parts)}; {beside}"


def from_json(value: Mapping[str, Any]) -> Privacy:
    """Read what ``Privacy.to_json`` wrote.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: a value is missing, of another type, or out of its range.
    """
    noise, epsilon, delta, rate, metrics_noise = (
        float(value[key]) if key in value else None
        for key in (
            "noise_multiplier", "epsilon", "delta", "sampling_rate", "metrics_noise_multiplier",
        )
    )  # fmt: skip
    if (noise is None) == (epsilon is None) or (epsilon is None) != (delta is None):
        raise ValueError("privacy: must hold noise_multiplier, or epsilon and delta")
    privacy = Privacy(
        str(value["mechanism"]),
        noise,
        float(value["clipping_bound"]),
        {str(site): str(digest) for site, digest in value["ledgers"].items()},
        epsilon,
        delta,
        value.get("unit"),
        rate,
        value.get("min_separation"),
        value.get("corrupt_sites"),
        value.get("metrics"),
        metrics_noise,
        value.get("statistics"),
    )
    _check(privacy)
    return privacy


def _check(privacy: Privacy) -> None:
    for key, allowed in _TEXTS.items():
        text = getattr(privacy, key)
        if text is not None and text not in allowed:
            raise ValueError(
                f"privacy: {key} must be one of {', '.join(allowed)}, got {text!r:.40}"
            )
    for key, mechanism in _MECHANISM_OF_KEY.items():
        if getattr(privacy, key) is not None and privacy.mechanism != mechanism:
            raise ValueError(
                f"privacy: {key} must be of {mechanism} only, got {privacy.mechanism!r:.40}"
            )
    for key, minimum in (("min_separation", 1), ("corrupt_sites", 0)):
        number = getattr(privacy, key)
        if number is not None and (type(number) is not int or number < minimum):
            raise ValueError(
                f"privacy: {key} must be a whole number from {minimum}, got {number!r:.40}"
            )
    rate, noise = privacy.sampling_rate, privacy.metrics_noise_multiplier
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"privacy: sampling_rate must be above 0 and at most 1, got {rate:g}")
    if (noise is not None) != (privacy.metrics == "noised"):
        raise ValueError("privacy: metrics_noise_multiplier must be there with metrics noised only")
    if noise is not None and not 0 < noise < math.inf:
        raise ValueError(f"privacy: metrics_noise_multiplier must be above 0, got {noise:g}")
