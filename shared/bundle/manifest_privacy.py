"""What a manifest says of differential privacy: what was asked of the run, and no promise of what it came to.

What a run costs follows from more than one number, and the sites' ledgers alone know all that was spent. So a manifest
holds what a reader needs to reckon by itself, and what left the sites without noise.
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
#: Keys of one mechanism alone.
_OF_MECHANISM: Final = {
    "sampling_rate": "central",
    "min_separation": "central-mf",
    "corrupt_sites": "distributed",
}


@dataclass(frozen=True)
class Privacy:
    """Under which differential privacy a model was learnt.

    Attributes:
        mechanism, clipping_bound: of the run.
        noise_multiplier: likewise; None where each site found its own for ``epsilon``.
        ledgers: by site, SHA-256 of its privacy ledger after its last round; what was spent stands there.
        epsilon, delta: the target that each site set its noise for; None beside a noise multiplier.
        unit: what the noise hides, ``"example"`` or ``"site"``.
        sampling_rate: chance of a site to be drawn in a round (central).
        min_separation: rounds from one turn of a site to its next (central-mf).
        corrupt_sites: of a sum, that may have added no noise (distributed).
        metrics: ``"off"``, nobody evaluated; ``"noised"``; ``"unprotected"``, counts left the sites without noise.
        metrics_noise_multiplier: of noised metrics, by what the counts can change by.
        statistics: ``"off"``; ``"unprotected"``, mean and deviation left the sites without noise.

    All from ``unit`` on are None in a manifest of before they were told.
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
        """As plain JSON values; what is None has no key."""
        found = {key: value for key, value in vars(self).items() if value is not None}
        return {**found, "ledgers": dict(self.ledgers)}

    def words(self) -> str:
        """One line for people; what the manifest does not tell is named, as silence would read as protection."""
        parts = [self.mechanism]
        # The mechanism's own name says it.
        if self.unit and self.unit != self.mechanism:
            parts.append(f"unit {self.unit}")
        if self.epsilon is None:
            parts.append(f"noise multiplier {self.noise_multiplier:g}")
        else:
            # Noised counts are within it, exact ones are in no epsilon at all.
            what = "training and metrics" if self.metrics == "noised" else "training"
            parts.append(f"epsilon {self.epsilon:g} at delta {self.delta:g} for {what}")
        parts.append(f"clipping bound {self.clipping_bound:g}")
        parts += [
            f"{key.replace('_', ' ')} {value:g}"
            for key in _OF_MECHANISM
            if (value := getattr(self, key)) is not None
        ]
        beside = f"metrics {self.metrics or 'not told'}"
        if self.metrics_noise_multiplier is not None:
            beside += f" with noise multiplier {self.metrics_noise_multiplier:g}"
        if self.statistics == "unprotected":
            beside += ", statistics unprotected"
        return f"{', '.join(parts)}; {beside}"


def from_json(value: Mapping[str, Any]) -> Privacy:
    """Read what ``Privacy.to_json`` gives.

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
    found = Privacy(
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
    _check(found)
    return found


def _check(found: Privacy) -> None:
    for key, known in _TEXTS.items():
        text = getattr(found, key)
        if text is not None and text not in known:
            raise ValueError(f"privacy: {key} must be one of {', '.join(known)}, got {text!r:.40}")
    for key, mechanism in _OF_MECHANISM.items():
        if getattr(found, key) is not None and found.mechanism != mechanism:
            raise ValueError(
                f"privacy: {key} must be of {mechanism} only, got {found.mechanism!r:.40}"
            )
    for key, least in (("min_separation", 1), ("corrupt_sites", 0)):
        number = getattr(found, key)
        if number is not None and (type(number) is not int or number < least):
            raise ValueError(
                f"privacy: {key} must be a whole number from {least}, got {number!r:.40}"
            )
    rate, noise = found.sampling_rate, found.metrics_noise_multiplier
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"privacy: sampling_rate must be above 0 and at most 1, got {rate:g}")
    if (noise is not None) != (found.metrics == "noised"):
        raise ValueError("privacy: metrics_noise_multiplier must be there with metrics noised only")
    if noise is not None and not 0 < noise < math.inf:
        raise ValueError(f"privacy: metrics_noise_multiplier must be above 0, got {noise:g}")
