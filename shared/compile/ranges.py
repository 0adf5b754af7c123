"""Ranges of a network's activations: observed example by example, merged over examples and sites.

Minima and maxima merge exactly, but they cannot be summed under secure aggregation, nor hidden by noise. There each
site counts, for each tensor, in how many examples the largest value lies in each bin of a fixed grid, and the same for
the smallest. Such histograms add up. A range then ends at the outer edge of a quantile's bin. The quantile of 1 is the
outermost bin that is not empty: never within the true range, and at most one bin beyond it. A lower one leaves out the
rarest extremes, which cost all other values their resolution.

The bins are half octaves from 2^-14 to 2^14 on either side of zero. Values beyond zero on the wrong side (a largest
value below it) are in the innermost bin: quantisation takes zero into every range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: Upper edges of the bins; a bin includes its edge. The first bin holds all values not beyond zero.
EDGES: Final = (
    0.0,
    *(math.ldexp(math.sqrt(2.0) if k % 2 else 1.0, k // 2) for k in range(-28, 29)),
)
BINS: Final = len(EDGES)
#: Histograms of each tensor, low and high: one example changes one bin in each.
SIDES: Final = 2
#: Probability that noise alone moves any end of any range outwards.
FALSE_ALARM: Final = 1e-3
#: Largest number of tensors whose ranges are requested; more than any network has.
MAX_TENSORS: Final = 2048


class HiddenError(ValueError):
    """No bin of a tensor's histogram is above the noise."""

    def __init__(self, tensor: int) -> None:
        super().__init__(f"tensor {tensor}: must have a bin above the noise, got none")
        self.tensor = tensor


def clipped(
    extremes: NDArray[Any], bound: float, *, finite: bool = True
) -> tuple[NDArray[np.float64], bool]:
    """Clip extremes to ``[-bound, bound]``.

    Args:
        extremes: ``(n, tensors, 2)``, the smallest and the largest value of each example.
        bound: above 0.
        finite: whether all values must be finite; else one that is not counts as beyond the bound, outwards.

    Returns:
        The clipped extremes in float64, and whether any was beyond the bound.

    Raises:
        ValueError: a value is NaN or infinite, and must be finite.
    """
    values = extremes.astype(np.float64)
    if not finite:
        values = np.where(np.isfinite(values), values, (-np.inf, np.inf))
    elif not np.isfinite(values).all():
        raise ValueError("activations: must be finite, got NaN or infinity")
    return np.clip(values, -bound, bound), bool((np.abs(values) > bound).any())


def merged(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The range ``(tensors, 2)`` of each tensor over several such arrays."""
    both = np.stack(parts)
    return np.stack([both[:, :, 0].min(axis=0), both[:, :, 1].max(axis=0)], axis=1)


def histogram(extremes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Histograms of the extremes of each tensor over examples.

    Args:
        extremes: ``(n, tensors, 2)``, clipped to the last edge or less.

    Returns:
        ``(tensors, 2, BINS)`` of int64, the side below zero first; each histogram adds up to ``n``.
    """
    magnitudes = np.stack([-extremes[:, :, 0], extremes[:, :, 1]], axis=2)
    bins = np.searchsorted(EDGES, magnitudes, side="left")
    if bins.max(initial=0) >= BINS:
        raise ValueError(f"activations: must be at most {EDGES[-1]:g} in size, got more")
    columns = magnitudes.shape[1] * SIDES
    cells = np.arange(columns) * BINS + bins.reshape(-1, columns)
    counts = np.bincount(cells.reshape(-1), minlength=columns * BINS)
    return counts.reshape(*magnitudes.shape[1:], BINS).astype(np.int64)


def from_histograms(
    counts: NDArray[np.float64], bound: float, *, quantile: float = 1.0, threshold: float = 0.0
) -> NDArray[np.float64]:
    """The range of each tensor from its histograms.

    Args:
        counts: ``(tensors, 2, BINS)``, summed over sites.
        bound: to which the activations were clipped, where a bin's edge lies beyond it.
        quantile: share of the examples whose extremes lie within each end, above 0 and at most 1.
        threshold: that a bin's count must exceed to count as not empty.

    Returns:
        ``(tensors, 2)``.

    Raises:
        HiddenError: all bins of a histogram count as empty.
    """
    within = np.where(counts > threshold, counts, 0.0).cumsum(axis=2)
    total = within[:, :, -1:]
    if not (total > 0).all():
        raise HiddenError(int(np.argwhere(total <= 0)[0][0]))
    # With a quantile of 1 the first bin that reaches the total: the empty ones beyond it add 0 to the sum, exactly.
    last = (within >= quantile * total).argmax(axis=2)
    ends = np.minimum(np.asarray(EDGES)[last], bound)
    # Not -0.0, which is another text for the same number.
    return np.stack([0.0 - ends[:, 0], ends[:, 1]], axis=1)


def above_noise(stddev: float, tensors: int) -> float:
    """The count that a bin of noise alone exceeds in one calibration of a thousand, over all bins together.

    Args:
        stddev: standard deviation of the noise on each bin.
        tensors: number of tensors with histograms.
    """
    bins = tensors * SIDES * BINS
    return stddev * NormalDist().inv_cdf(1.0 - FALSE_ALARM / bins)


def sensitivity(tensors: int) -> float:
    """L2 sensitivity of all histograms together to one example, or to the shares of one site."""
    return math.sqrt(SIDES * tensors)


def names(tensors: int) -> tuple[str, ...]:
    """Names of the histograms' counters, in the order of the flattened array."""
    return tuple(f"bin-{i}" for i in range(tensors * SIDES * BINS))
