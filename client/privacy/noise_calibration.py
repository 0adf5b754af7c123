"""What a round of DP-SGD gives out, without the machinery that computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from fedge.shared.config.sections import TrainSection
from fedge.shared.privacy.accounting import epsilon as accounting
from fedge.shared.privacy.accounting.epsilon import Release, calibrate


@dataclass(frozen=True)
class Noise:
    """How single examples are protected.

    Attributes:
        noise_multiplier: standard deviation of the noise, by the clipping bound.
        clipping_bound: L2 norm to which an example's gradient is scaled down.
    """

    noise_multiplier: float
    clipping_bound: float


def noise_within(
    epsilon: float,
    delta: float,
    clipping_bound: float,
    settings: TrainSection,
    rows: int,
    rounds: int,
    evaluations: Release | None = None,
) -> Noise:
    """The noise that keeps a whole run within epsilon.

    Args:
        epsilon: of all rounds together.
        delta: at which.
        clipping_bound: of the noise.
        settings: batch size and number of steps.
        rows: training examples of the site, at least 1.
        rounds: of the run.
        evaluations: all of the run's, where they are noised: they are within the same epsilon.

    Raises:
        ValueError: no noise does; what is no number has been refused before.
    """
    beside = (evaluations,) if evaluations else ()
    alone = accounting.epsilon(beside, delta)
    if evaluations and alone >= epsilon:
        raise ValueError(
            f"epsilon: must be above {alone:.4g}, which {evaluations.steps} evaluations with metrics-noise-multiplier"
            f" {evaluations.noise_multiplier:g} cost by themselves, got {epsilon:g}"
        )
    one = release_of(Noise(1.0, clipping_bound), settings, rows)
    found = _calibrated(epsilon, delta, one.sampling_rate, one.steps * rounds, beside)
    return Noise(found, clipping_bound)


@lru_cache(maxsize=1024)
def _calibrated(
    epsilon: float, delta: float, sampling_rate: float, steps: int, beside: tuple[Release, ...]
) -> float:
    # A search takes about a second, and each of a run's rounds asks for the same.
    return calibrate(epsilon, delta, sampling_rate, steps, beside)


def release_of(noise: Noise, settings: TrainSection, rows: int) -> Release:
    """What a round of training gives out.

    Args:
        noise: of each step.
        settings: batch size and number of steps.
        rows: training examples of the site, at least 1.
    """
    rate = min(1.0, settings.batch_size / rows)
    steps = settings.local_steps or math.ceil((settings.local_epochs or 1) / rate)
    return Release(noise.noise_multiplier, rate, steps)
