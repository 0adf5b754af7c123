"""A clipping bound that follows a quantile of the updates' norms (Andrew et al. 2021, https://arxiv.org/abs/1905.03871).

Each site says in one bit whether its norm was at most the bound. The bits are summed with noise, and the bound is
multiplied by exp(-learning_rate (fraction - target)): down where too many were below, up where too few.

The bits cost privacy too. A site sends its bit less 1/2, so that the sum's sensitivity is 1/2 and not 1; together with
updates noised by z_updates the round is worth one Gaussian release of noise multiplier z, z^-2 = z_updates^-2 +
(2 sigma_b)^-2.
"""

from __future__ import annotations

import math
from typing import Final

from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.discrete_gaussian import MAX_SIGMA, table

MIN_COUNT_NOISE: Final = 0.001
MAX_COUNT_NOISE: Final = MAX_SIGMA / 4

#: The noise is sampled on a grid of at least 2^10 steps a standard deviation: its privacy is then the continuous
#: Gaussian's, which accountants assume, to 2 10^-6 of delta. On whole numbers, at a standard deviation of 1, delta
#: is off by up to 70 %.
_GRID_BITS: Final = 10


def update(
    clipping_bound: float,
    fraction_below: float,
    target_quantile: float = 0.5,
    learning_rate: float = 0.2,
) -> float:
    """The next round's bound.

    Args:
        clipping_bound: this round's, above 0.
        fraction_below: share of the norms at or below it, with noise, so possibly below 0 or above 1.
        target_quantile: share that should be, 0 to 1.
        learning_rate: above 0.

    Raises:
        ValueError: an argument is out of its range, or the next bound is not within float64's.
    """
    if not 0 < clipping_bound < math.inf:
        raise ValueError(f"clipping_bound: must be above 0 and finite, got {clipping_bound}")
    if not math.isfinite(fraction_below):
        raise ValueError(f"fraction_below: must be finite, got {fraction_below}")
    if not 0 <= target_quantile <= 1:
        raise ValueError(f"target_quantile: must be 0 to 1, got {target_quantile}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate: must be above 0 and finite, got {learning_rate}")
    exponent = math.log(clipping_bound) - learning_rate * (fraction_below - target_quantile)
    if not -700 < exponent < 700:
        raise ValueError(f"clipping_bound: must be e^-700 to e^700 after it, got e^{exponent:.0f}")
    return clipping_bound * math.exp(-learning_rate * (fraction_below - target_quantile))


def noise_multiplier_of_updates(noise_multiplier: float, count_noise_multiplier: float) -> float:
    """What the updates are noised with so that updates and bits together are worth ``noise_multiplier``.

    Args:
        noise_multiplier: z of the whole round, above 0.
        count_noise_multiplier: sigma_b, standard deviation of the noise on the sum of bits; above z / 2.

    Raises:
        ValueError: the bits alone would cost as much or more than the whole round may.
    """
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier: must be above 0 and finite, got {noise_multiplier}")
    if not 2 * count_noise_multiplier > noise_multiplier:
        raise ValueError(
            f"count_noise_multiplier: must be above noise_multiplier / 2 = {noise_multiplier / 2}, "
            f"got {count_noise_multiplier}"
        )
    share = noise_multiplier / (2 * count_noise_multiplier)
    # In factors, for 1 - share^2 loses its digits near 1.
    return noise_multiplier / math.sqrt((1 - share) * (1 + share))


def noisy_fraction(
    bits: int,
    sites: int,
    count_noise_multiplier: float,
    entropy: Entropy,
    expected: float | None = None,
) -> float:
    """The share of norms at or below the bound, with noise.

    The noise is a discrete Gaussian on the sum of 2 bit - 1, a whole number of sensitivity 1, in fractions 2^-g: no
    float's low bits are in the release.

    Args:
        bits: how many said that their norm was at most the bound, 0 to ``sites``.
        sites: that answered; with ``expected`` possibly none.
        count_noise_multiplier: sigma_b, ``MIN_COUNT_NOISE`` to ``MAX_COUNT_NOISE``.
        entropy: where the random bits come from.
        expected: sites in the sample on average, above 0. Needed under Poisson sampling: how many answered is
            then itself a secret, and dividing by it would not have the sensitivity that is accounted for. ``sites``
            where not given.

    Returns:
        1/2 + (bits - sites / 2 + noise) / expected: possibly below 0 or above 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    # An empty sample is a sample: its round has the same noise as any other.
    min_sites = 1 if expected is None else 0
    if sites < min_sites:
        raise ValueError(f"sites: must be {min_sites} or more, got {sites}")
    if not 0 <= bits <= sites:
        raise ValueError(f"bits: must be 0 to {sites}, got {bits}")
    if not MIN_COUNT_NOISE <= count_noise_multiplier <= MAX_COUNT_NOISE:
        raise ValueError(
            f"count_noise_multiplier: must be {MIN_COUNT_NOISE} to {MAX_COUNT_NOISE:g}, got {count_noise_multiplier}"
        )
    divisor = float(sites) if expected is None else expected
    if not 0 < divisor < math.inf:
        raise ValueError(f"expected: must be above 0 and finite, got {expected}")
    _, exponent = math.frexp(2 * count_noise_multiplier)
    steps = 1 << max(0, _GRID_BITS + 1 - exponent)
    noise = int(table(2 * count_noise_multiplier * steps).sample(1, entropy)[0])
    return 0.5 + ((2 * bits - sites) * steps + noise) / (2 * steps * divisor)
