"""What Gaussian noise is worth: epsilon of many releases together, and the noise that a budget asks for.

A release is the sum over a sample, clipped, with Gaussian noise; the discrete Gaussian of the same noise multiplier is
counted the same. Releases of one kind are put together before they are composed:

- ``analytic``: no one is left out. Many Gaussians are one, as their 1 / sigma^2 add up, and its epsilon is exact
  (Balle and Wang 2018, https://arxiv.org/abs/1805.06530, theorem 8).
- ``PLD``: each is sampled independently. Privacy loss distributions, connect-the-dots (Doroshenko et al. 2022,
  https://arxiv.org/abs/2207.04380), by Google's dp-accounting; adding or removing one.
- ``RDP``: a sample of a fixed size, without replacement (Wang, Balle and Kasiviswanathan 2019,
  https://arxiv.org/abs/1808.00087), by dp-accounting too; replacing one. A clipped sum changes by up to twice the
  clipping bound when one is replaced: the noise multiplier has to be taken over that. Poisson releases beside one of a
  fixed size count as if no one was left out, as there is no RDP bound for them under this relation.

PLD rounds losses to a grid, always upwards. The grid is chosen so that this adds about 1e-4 at most, or 1e-5 of an
epsilon above 10. No epsilon is above that without sampling, which holds in any case.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import numpy as np
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
    from numpy.typing import NDArray

#: Below it, rounding in PLD's Fourier transforms is no longer small against delta.
MIN_DELTA: Final = 1e-10
#: Bounds of the search for a noise multiplier.
MIN_NOISE: Final = 0.01
MAX_NOISE: Final = 1e4

#: With less noise a release counts without sampling: its epsilon is in the hundreds either way, and PLD overflows.
_MIN_SAMPLED: Final = 0.05
#: More noise than this, and a smaller sampling rate, count as these.
_MAX_SAMPLED: Final = 1e6
_MIN_RATE: Final = 1e-9
#: Of delta for each step, what rounding may do to PLD's tails; where that is more than delta, sampling counts nothing.
_ROUNDING: Final = 1e-14
#: What the grid of PLD may add to epsilon, up to an epsilon of 10; beyond, in proportion.
_TOLERANCE: Final = 1e-4
#: Grid steps across the losses of one release, and of all together, about; a finer grid takes seconds.
_GRID_STEPS_OF_ONE: Final = 1e5
_GRID_STEPS_TOGETHER: Final = 3e5
#: Standard deviations of the noise on either side that PLD looks at, about: it drops e^-50 of the mass.
_WIDTH: Final = 10.0
_PRECISION: Final = 1.001


@dataclass(frozen=True)
class Release:
    """Some releases of one kind.

    Attributes:
        noise_multiplier: standard deviation of the noise over the L2 sensitivity, 0 or more.
        sampling_rate: chance to be in the sample, above 0 and up to 1.
        steps: how many releases, 1 or more, each on a fresh sample.
        fixed_size: the sample has a fixed size and is taken without replacement; else each is sampled independently.

    Raises:
        ValueError: an attribute is out of its range.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1
    fixed_size: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(
                f"noise_multiplier: must be 0 or more and finite, got {self.noise_multiplier}"
            )
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(
                f"sampling_rate: must be above 0 and up to 1, got {self.sampling_rate}"
            )
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps: must be a whole number from 1, got {self.steps}")


def epsilon(releases: Sequence[Release], delta: float) -> float:
    """Epsilon of all releases together, at this delta.

    Args:
        releases: in any order; none give 0.
        delta: ``MIN_DELTA`` to below 1.

    Returns:
        An upper bound, see the module for how tight; infinite where a release has no noise.

    Raises:
        ValueError: delta is out of its range.
    """
    _require_delta(delta)
    return _epsilon(_merged(releases), delta)


def accountant(releases: Sequence[Release]) -> Literal["analytic", "PLD", "RDP"]:
    """Which of the three ways ``epsilon`` goes."""
    return _accountant(_merged(releases))


def unamplified(releases: Sequence[Release]) -> list[Release]:
    """The same releases for an adversary who sees who was sampled, as the server does: sampling hides no one."""
    return [replace(release, sampling_rate=1.0) for release in releases]


def calibrate(
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    beside: Sequence[Release] = (),
) -> float:
    """The smallest noise multiplier that keeps within epsilon.

    Args:
        epsilon: of all steps together, above 0.
        delta: ``MIN_DELTA`` to below 1.
        sampling_rate: of a Poisson sample.
        steps: how many releases.
        beside: further releases within the same epsilon, without sampling.

    Returns:
        ``MIN_NOISE`` to ``MAX_NOISE``, at most 0.1 % above the smallest, never below it.

    Raises:
        ValueError: an argument is out of its range, or more noise would be needed than ``MAX_NOISE``.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon: must be above 0 and finite, got {epsilon}")
    _require_delta(delta)
    Release(1.0, sampling_rate, steps)

    def spent(noise_multiplier: float) -> float:
        return _epsilon(_merged([Release(noise_multiplier, sampling_rate, steps), *beside]), delta)

    # What is enough without sampling is enough with it; the little more makes up for the rounding of the search.
    room = _gaussian_noise(epsilon, delta) ** -2
    room -= math.fsum(one.steps / one.noise_multiplier**2 for one in beside)
    enough = math.sqrt(steps / room) * (1 + 1e-9) if room > 0 else MAX_NOISE
    start = min(max(enough, MIN_NOISE), MAX_NOISE)
    if spent(start) > epsilon:
        raise ValueError(
            f"epsilon: must be reachable with a noise multiplier up to {MAX_NOISE:g}, got {epsilon}"
        )
    return start if sampling_rate == 1 else _min_noise(spent, epsilon, start)


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Epsilon of one Gaussian release without sampling, to a relative 1e-12 and rounded up.

    The smallest epsilon with Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu) <= delta, where mu is 1 over
    the noise multiplier (Balle and Wang 2018, theorem 8), by bisection.

    Args:
        noise_multiplier: 0 or more; 0 gives infinity.
        delta: above 0 and below 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    Release(noise_multiplier)
    if not 0 < delta < 1:
        raise ValueError(f"delta: must be above 0 and below 1, got {delta}")
    mu = 1 / noise_multiplier if noise_multiplier > 0 else math.inf
    # Beyond, even its square is no float any more.
    if mu > 1e150:
        return math.inf
    target = math.log(delta)
    if _log_delta(mu, 0.0) <= target:
        return 0.0
    low, high = 0.0, 1.0
    while _log_delta(mu, high) > target:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if _log_delta(mu, middle) > target:
            low = middle
        else:
            high = middle
    return high


def _log_delta(mu: float, epsilon: float) -> float:
    """Log of delta of a Gaussian release; -inf where it is 0 in floats."""
    upper = _log_tail(epsilon / mu - mu / 2)
    lower = epsilon + _log_tail(epsilon / mu + mu / 2)
    return upper + math.log1p(-math.exp(lower - upper)) if lower < upper else -math.inf


def _log_tail(x: float) -> float:
    """Log of the chance that a standard normal is above x."""
    if x < 30:
        return math.log(math.erfc(x / math.sqrt(2)) / 2)
    # Here erfc comes close to the smallest float; the series is right to 1e-12 of the log.
    square = x * x
    series = (-1 + (3 - 15 / square) / square) / square
    return -square / 2 - math.log(x * math.sqrt(2 * math.pi)) + math.log1p(series)


def _require_delta(delta: float) -> None:
    if not MIN_DELTA <= delta < 1:
        raise ValueError(f"delta: must be {MIN_DELTA:g} to below 1, got {delta}")


def _gaussian_noise(epsilon: float, delta: float) -> float:
    """The inverse of ``gaussian_epsilon`` in the noise multiplier, rounded up; epsilon above 0."""
    target = math.log(delta)
    low, high = 0.0, 1.0
    while _log_delta(high, epsilon) <= target:
        low, high = high, 2 * high
    while low == 0 or high - low > 1e-12 * high:
        middle = (low + high) / 2
        if _log_delta(middle, epsilon) <= target:
            low = middle
        else:
            high = middle
    return 1 / low


def _min_noise(spent: Callable[[float], float], budget: float, high: float) -> float:
    """The smallest noise multiplier that spends no more than the budget, to ``_PRECISION``; ``high`` does not."""
    at_high = spent(high)
    low, at_low = high / 2, spent(high / 2)
    while at_low <= budget:
        if low <= MIN_NOISE:
            return MIN_NOISE
        high, at_high = low, at_low
        low, at_low = low / 2, spent(low / 2)
    for turn in itertools.count(1):
        if high <= _PRECISION * low:
            break
        # A line through both ends, in logarithms; every third time their middle, as the line may creep.
        share = 0.5
        if turn % 3 and at_high > 0 and at_low < math.inf:
            share = math.log(at_low / budget) / math.log(at_low / at_high)
        # A little aside of where the line says: then the other end is found just beside it.
        guess = low * (high / low) ** share * (1 + 0.3 * (_PRECISION - 1))
        guess = min(max(guess, low * 1.0003), high / (1 + 0.9 * (_PRECISION - 1)))
        at_guess = spent(guess)
        if at_guess <= budget:
            high, at_high = guess, at_guess
        else:
            low, at_low = guess, at_guess
    return high


def _merged(releases: Iterable[Release]) -> tuple[Release, ...]:
    """One release of each kind, sorted; those without sampling become a single Gaussian one, which comes first."""
    kinds: Counter[tuple[float, float, bool]] = Counter()
    for release in releases:
        noise, rate, fixed = release.noise_multiplier, release.sampling_rate, release.fixed_size
        if rate == 1 or noise < _MIN_SAMPLED:
            rate, fixed = 1.0, False
        else:
            noise, rate = min(noise, _MAX_SAMPLED), max(rate, _MIN_RATE)
        kinds[noise, rate, fixed] += release.steps
    ordered = sorted(kinds.items())
    plain = [(noise, steps) for (noise, rate, _), steps in ordered if rate == 1]
    sampled = [
        Release(noise, rate, steps, fixed) for (noise, rate, fixed), steps in ordered if rate < 1
    ]
    return (*([Release(_together(plain))] if plain else []), *sampled)


def _together(plain: Sequence[tuple[float, int]]) -> float:
    """The noise multiplier of one Gaussian release that is worth all of these, (noise multiplier, steps)."""
    min_noise = min(noise for noise, _ in plain)
    if min_noise == 0:
        return 0.0
    # Relative to the smallest one, as the square of its inverse may be no float.
    return min_noise / math.sqrt(
        math.fsum(steps * (min_noise / noise) ** 2 for noise, steps in plain)
    )


def _accountant(parts: tuple[Release, ...]) -> Literal["analytic", "PLD", "RDP"]:
    if any(part.fixed_size for part in parts):
        return "RDP"
    return "PLD" if any(part.sampling_rate < 1 for part in parts) else "analytic"


@lru_cache(maxsize=4096)
def _epsilon(parts: tuple[Release, ...], delta: float) -> float:
    if not parts:
        return 0.0
    # Who is sampled at random is never worse off than who always takes part: no bound need be above this one.
    plain = _together([(part.noise_multiplier, part.steps) for part in parts])
    without = gaussian_epsilon(plain, delta)
    if without == math.inf:
        return math.inf
    match _accountant(parts):
        case "RDP":
            return min(_by_rdp(parts, delta), without)
        case "PLD" if sum(part.steps for part in parts) * _ROUNDING <= delta:
            bound = _composed(parts, _interval(parts, delta)).get_epsilon_for_delta(delta)
            return min(float(bound), without)
        case _:
            return without


@lru_cache(maxsize=64)
def _composed(parts: tuple[Release, ...], interval: float) -> PrivacyLossDistribution:
    """The distribution of all parts together, by halves: where one part changes, most halves are known."""
    if len(parts) > 1:
        half = len(parts) // 2
        return _composed(parts[:half], interval).compose(_composed(parts[half:], interval))
    part = parts[0]
    return _one(part.noise_multiplier, part.sampling_rate, interval).self_compose(part.steps)


@lru_cache(maxsize=64)
def _one(noise_multiplier: float, sampling_rate: float, interval: float) -> PrivacyLossDistribution:
    """The distribution of a single release."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sampling_rate
    )


def _interval(parts: tuple[Release, ...], delta: float) -> float:
    """The grid of losses, a power of 2, so that it seldom changes as steps are added.

    A loss that falls between two points of a grid of width h is put on both, which adds a variance of h^2 / 6 on
    average. Of a sum of N losses with standard deviation s, epsilon is about its mean plus k s, with
    k = sqrt(2 log(1 / delta)), so that it grows by N h^2 (k + s) / (12 s); measured, it is half of that to all of it.
    """
    import numpy as np

    mean = variance = widest = 0.0
    for part in parts:
        one_mean, one_variance = _moments(part.noise_multiplier, part.sampling_rate)
        mean += part.steps * one_mean
        variance += part.steps * one_variance
        largest = (_WIDTH + 0.5 / part.noise_multiplier) / part.noise_multiplier
        # With sampling, log(1 - q + q e^loss).
        widest = max(widest, np.logaddexp(0, math.log(part.sampling_rate) + largest))
    stddev = math.sqrt(variance)
    quantile = math.sqrt(-2 * math.log(delta))
    tolerance = _TOLERANCE * max(1, (mean + quantile * stddev) / 10)
    steps = sum(part.steps for part in parts)
    fine = math.sqrt(12 * tolerance * stddev / ((quantile + stddev) * steps))
    coarse = max(widest / _GRID_STEPS_OF_ONE, 16 * stddev / _GRID_STEPS_TOGETHER)
    return 2.0 ** math.floor(math.log2(max(fine, coarse)))


@lru_cache(maxsize=1024)
def _moments(noise_multiplier: float, sampling_rate: float) -> tuple[float, float]:
    """Mean and variance of a single release's loss, where one is removed."""
    import numpy as np

    points = np.linspace(-_WIDTH, _WIDTH, 2001)
    weights = np.exp(-(points**2) / 2)
    weights /= weights.sum()
    sides = []
    for centre, share in ((0, 1 - sampling_rate), (1, sampling_rate)):
        plain = (centre + noise_multiplier * points - 0.5) / noise_multiplier**2
        with np.errstate(divide="ignore"):
            losses = np.logaddexp(np.log(1 - sampling_rate), np.log(sampling_rate) + plain)
        sides.append((share, losses))
    mean = sum(share * float(weights @ losses) for share, losses in sides)
    variance = sum(share * float(weights @ (losses - mean) ** 2) for share, losses in sides)
    return mean, variance


def _by_rdp(parts: tuple[Release, ...], delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    curves = [_curve(replace(part, steps=1)) for part in parts]
    orders, together = curves[0][0], 0 * curves[0][1]
    for part, (_, curve) in zip(parts, curves, strict=True):
        together = together + part.steps * curve
    return float(compute_epsilon(orders, together, delta)[0])


@lru_cache(maxsize=256)
def _curve(one: Release) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Orders, and the Renyi divergence of a single release at each, where one is replaced."""
    from dp_accounting.dp_event import DpEvent, GaussianDpEvent, SampledWithoutReplacementDpEvent
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    event: DpEvent = GaussianDpEvent(one.noise_multiplier)
    if one.fixed_size:
        # Only the ratio of the two sizes counts.
        sample, everyone = one.sampling_rate.as_integer_ratio()
        event = SampledWithoutReplacementDpEvent(everyone, sample, event)
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE).compose(event)
    return accountant.orders, accountant.rdp
