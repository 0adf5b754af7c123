"""A sum of updates that one site changes by the clipping bound at most, in whole numbers, with noise.

Each update is scaled down to the bound, taken to whole steps of a grid, and added with weight 1. Whole numbers add up
to the same in any order, and noise in whole steps (``discrete_gaussian``) has no low bits that tell what is under it.
The grid is so fine that accountants may assume the continuous Gaussian, and that rounding is little beside the
smallest values of interest: an update's mean coordinate at its bound is 16 steps or more, unless the noise is so much
larger than the update that the table of its probabilities would take too long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared.wire.tensors import NDArrays

#: Steps of the grid in a standard deviation of the noise: below the first, the accountant's Gaussian and the discrete
#: one begin to differ; beyond the last, its table takes long to make, and much memory.
MIN_STDDEV: Final = 2.0**12
MAX_STDDEV: Final = 2.0**18
#: Steps in the mean coordinate of an update at the bound.
_FINE: Final = 16.0
#: After so many tries nothing is left of an update that does not become short enough.
_TRIES: Final = 10


@dataclass(frozen=True)
class IntegerGrid:
    """The whole numbers in which a round is added up.

    Attributes:
        clipping_bound: L2 norm to which an update is scaled down.
        stddev: standard deviation of the noise, in steps.
        step: width of a step.
    """

    clipping_bound: float
    stddev: float
    step: float

    @property
    def sensitivity_steps(self) -> float:
        """The clipping bound in steps: no update on the grid is longer."""
        return self.clipping_bound / self.step


def grid(clipping_bound: float, noise_multiplier: float, size: int) -> IntegerGrid:
    """The grid for noise of a standard deviation of ``noise_multiplier`` times the bound.

    Args:
        clipping_bound: above 0.
        noise_multiplier: above 0.
        size: coordinates of an update.
    """
    wanted = _FINE * noise_multiplier * math.sqrt(max(size, 1))
    # A power of two, so that the table of one round serves the next.
    stddev = 2.0 ** math.ceil(math.log2(min(max(wanted, MIN_STDDEV), MAX_STDDEV)))
    return IntegerGrid(clipping_bound, stddev, noise_multiplier * clipping_bound / stddev)


def floating(arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """Names of the tensors that are learnt, in their order; no noise could cover counters."""
    return [name for name, a in arrays.items() if a.dtype.kind == "f"]


def difference(arrays: NDArrays, current: NDArrays) -> NDArray[np.float64]:
    """What a site changed, in float64, all learnt tensors of ``current`` one after the other."""
    parts = [
        np.ravel(arrays[name]).astype(np.float64) - np.ravel(current[name]).astype(np.float64)
        for name in floating(current)
    ]
    return np.concatenate([np.empty(0), *parts])


def norm(values: NDArray[np.float64]) -> float:
    """The L2 norm of a vector, in this thread alone: those of BLAS wait for each other on a busy machine."""
    return math.sqrt(float(np.einsum("i,i->", values, values)))


def on_grid(
    update: NDArray[np.float64], length: float, integer_grid: IntegerGrid
) -> NDArray[np.int64]:
    """An update in steps, never longer than the bound.

    Args:
        update: ``(d,)``, finite.
        length: its L2 norm.
        integer_grid: the grid of the sum.

    Returns:
        ``(d,)`` whole numbers of an L2 norm of ``integer_grid.sensitivity_steps`` at most: scaled down and taken to the
        nearest step, and where that made it longer, scaled down a little more. It depends on nothing but this update.
    """
    factor = min(1.0, integer_grid.clipping_bound / max(length, 1e-300)) / integer_grid.step
    found = np.zeros(update.size)
    for tried in range(_TRIES + 1):
        np.rint(update * factor, out=found)
        steps = norm(found)
        if steps <= integer_grid.sensitivity_steps:
            break
        factor *= integer_grid.sensitivity_steps / steps * (1 - 4.0 ** (tried - _TRIES))
    return found.astype(np.int64)


def moved(current: NDArrays, mean_update: NDArray[np.float64]) -> NDArrays:
    """The round's tensors with a mean update added, the learnt ones in float64; the others as they are."""
    found: NDArrays = {}
    start = 0
    learnt = set(floating(current))
    for name, a in current.items():
        if name not in learnt:
            found[name] = a
            continue
        change = mean_update[start : start + a.size].reshape(a.shape)
        found[name] = a.astype(np.float64) + change
        start += a.size
    return found
