"""What a round of DP-SGD gives out, without the machinery that computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedge.shared.config import TrainSection
from fedge.shared.privacy.accounting import Release


@dataclass(frozen=True)
class Noise:
    """How single examples are protected.

    Attributes:
        noise_multiplier: standard deviation of the noise, by the clipping bound.
        clipping_bound: L2 norm to which an example's gradient is scaled down.
    """

    noise_multiplier: float
    clipping_bound: float


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
