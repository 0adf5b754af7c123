"""Counters over held-out examples with noise, which leave a site as a release of their own.

The unit decides what the noise must hide:

- example: one held-out example more or less changes each counter by 1 at most, the number of examples too.
- site: every counter is divided by the site's number of examples, so that it lies within [0, 1] whatever the site
  holds, and every site weighs the same. The number of examples is then the constant 1, and needs no noise.

Either way k counters together change by sqrt(k) at most in L2 norm, and each gets discrete Gaussian noise of standard
deviation noise_multiplier * sqrt(k), on a grid of 2^-b. Values are rounded to that grid first: a change of at most 1
stays one of at most 2^b steps.

The sum of the losses is not reported. It has no bound, and to clip it needs each example's own loss, which a task's
counters, sums over a batch, do not give.

Nothing is cut off at a site: counters cut to their range would be wrong on average, and stay wrong in a mean over many
sites. It is the metrics that the server holds to [0, 1]; each is a share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedge.shared.config.privacy import PrivacySection, Unit
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.discrete_gaussian import MAX_SIGMA, table

EXAMPLES: Final = "examples"
LOSS: Final = "loss-sum"
#: Most bits of the grid, which are those of exact counters under secure aggregation.
MAX_BITS: Final = 20

#: Below so many steps a standard deviation, the accountant's Gaussian and the discrete one begin to differ.
_MIN_STDDEV: Final = 1000.0
_GRID_BITS: Final = 10
#: Standard deviations that no noise is beyond, but for once in 10^15 counters.
_TAIL_STDDEVS: Final = 8.0


@dataclass(frozen=True)
class NoisedCounts:
    """How a task's counters leave a site.

    Attributes:
        unit: what the noise hides.
        reported: names of the counters that leave, sorted.
        stddev: standard deviation of one site's noise on a counter.
        noise_multiplier: of the noise that is charged, which under secure aggregation is that of
            several sites together.
    """

    unit: Unit
    reported: tuple[str, ...]
    stddev: float
    noise_multiplier: float

    @property
    def noised(self) -> tuple[str, ...]:
        """Names of the counters that get noise."""
        return _noised(self.unit, self.reported)

    @property
    def bits(self) -> int:
        """Bits of the grid: the smallest number that gives 2^10 steps a standard deviation."""
        _, exponent = math.frexp(self.stddev)
        return min(max(0, _GRID_BITS + 1 - exponent), MAX_BITS)

    @property
    def max_noise(self) -> float:
        """Bound on the magnitude of one site's noise on a counter, in the counter's own unit."""
        return _TAIL_STDDEVS * self.stddev

    def require_grid(self) -> None:
        """Check that the noise is within the limits of the grid.

        Raises:
            ValueError: it is so little that the accountant's Gaussian differs from the discrete one, or too much.
        """
        steps = 2.0**self.bits
        low, high = _MIN_STDDEV / steps, MAX_SIGMA / steps
        if not low <= self.stddev <= high:
            raise ValueError(
                f"noise on counters: must be {low:g} to {high:g}, got {self.stddev:.3g};"
                " change metrics-noise-multiplier"
            )

    def make(self, sums: Mapping[str, float], entropy: Entropy) -> dict[str, float]:
        """The counters that leave the site.

        Args:
            sums: exact sums over the site's held-out examples; all 0 where it has none.
            entropy: where the random bits come from.

        Returns:
            By name, multiples of 2^-``bits``, possibly below 0 or above the number of examples.

        Raises:
            ValueError: a counter is not finite, or the noise is outside the limits of the grid.
        """
        count = sums.get(EXAMPLES, 0.0)
        exact = np.array([sums[name] for name in self.noised], np.float64)
        if not (np.isfinite(exact).all() and math.isfinite(count)):
            raise ValueError("counters: must be finite, got NaN or infinity")
        self.require_grid()
        steps = 2.0**self.bits
        if self.unit == "site":
            exact = np.clip(exact / max(count, 1.0), 0.0, 1.0)
        # Not to the nearest even number, which two values that are a whole number of steps apart need not agree on.
        whole = np.floor(exact * steps + 0.5).astype(np.int64)
        whole += table(self.stddev * steps).sample(whole.size, entropy)
        reported = {name: 1.0 for name in self.reported if name == EXAMPLES}
        return reported | {n: float(v) / steps for n, v in zip(self.noised, whole, strict=True)}


def plan(
    section: PrivacySection,
    counter_names: Iterable[str],
    honest: int = 1,
    sensitivity: float | None = None,
) -> NoisedCounts | None:
    """How counters leave a site; None where they leave it without noise, or not at all.

    Args:
        section: the mechanism.
        counter_names: of the task's metrics.
        honest: sites whose noise is in every sum that is unmasked, at least, where it is their noise together that
            hides a site; 1 where each site's noise has to do.
        sensitivity: what one unit changes all counters by together, in L2 norm; the root of their number unless
            given. Of a histogram one example changes one bin, and a site's shares have a norm of 1 at most.
    """
    if section.metrics != "noised" or section.metrics_noise_multiplier is None:
        return None
    reported = tuple(sorted(name for name in counter_names if name != LOSS))
    changed = sensitivity or math.sqrt(max(1, len(_noised(section.unit, reported))))
    stddev = section.metrics_noise_multiplier * changed / math.sqrt(honest)
    return NoisedCounts(section.unit, reported, stddev, section.metrics_noise_multiplier)


def _noised(unit: Unit, reported: tuple[str, ...]) -> tuple[str, ...]:
    return reported if unit == "example" else tuple(name for name in reported if name != EXAMPLES)
