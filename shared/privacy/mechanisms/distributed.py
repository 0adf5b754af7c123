"""Distributed noise in whole numbers, added by every site before masking, so that the server sees only their sum.

The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation (Kairouz, Liu and Steinke,
ICML 2021, https://arxiv.org/abs/2102.06387), without its rotation: in a ring of 2^32 the grid can be so fine that
rounding costs nothing against the continuous Gaussian, and no coordinate comes near the ring's ends.

A clipped update of L2 norm C becomes whole numbers on a grid of 2^16 steps to C, rounded at random such that its norm
is at most ``sensitivity``; a vector that comes out longer is rounded again (their Proposition 26, beta = e^(-1/2)).
Each site adds discrete Gaussian noise of variance (noise_multiplier * sensitivity)^2 / h, where h honest sites at least
are in every sum that is unmasked. The sum of their noise is no discrete Gaussian, but at 1 000 steps a standard
deviation and more it differs from one by less than anybody can count (their Theorem 9: by e^(-2 pi^2 sigma^2 / 2)).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.discrete_gaussian import MAX_SIGMA, table

#: Steps of the grid in a clipping bound.
STEPS: Final = 2**16
#: Below so many steps a standard deviation, the accountant's Gaussian and the discrete one begin to differ.
MIN_STDDEV: Final = 1000.0

_BITS: Final = 53
_TRIES: Final = 200
#: Standard deviations that no sum of noise is beyond, but for once in 10^30 coordinates.
_TAIL_STDDEVS: Final = 12.0


def steps_a_unit(clipping_bound: float) -> float:
    """Steps of the grid for each unit of a value."""
    return STEPS / clipping_bound


def sensitivity(size: int, steps: int = STEPS) -> float:
    """The largest L2 norm, in steps, of an update of so many coordinates that was clipped and rounded.

    Args:
        size: coordinates.
        steps: in a clipping bound.
    """
    if size < 1:
        raise ValueError(f"size: must be at least 1, got {size}")
    loose = (steps + math.sqrt(size)) ** 2
    # sqrt(2 log(1 / beta)) is 1.
    tight = steps**2 + size / 4 + steps + math.sqrt(size) / 2
    return math.sqrt(min(loose, tight))


def stddev(noise_multiplier: float, size: int, honest: int, sites: int) -> float:
    """Standard deviation of one site's noise, in steps.

    Args:
        noise_multiplier: of the sum over ``honest`` sites, by the sensitivity.
        size: coordinates of the update.
        honest: sites whose noise is in every sum that is unmasked, at least.
        sites: in the sum, at most.

    Raises:
        ValueError: the grid is too coarse for so little noise, or the ring too small for so much.
    """
    if not 1 <= honest <= sites:
        raise ValueError(f"honest sites: must be 1 to {sites}, got {honest}")
    result = noise_multiplier * sensitivity(size) / math.sqrt(honest)
    if not MIN_STDDEV <= result <= MAX_SIGMA:
        raise ValueError(
            f"noise of one site: must be {MIN_STDDEV:g} to {MAX_SIGMA:g} steps, got {result:.0f};"
            " change noise-multiplier"
        )
    largest = sites * (STEPS + 1) + _TAIL_STDDEVS * result * math.sqrt(sites)
    if largest >= 2**31:
        raise ValueError(
            f"sum: must stay within 2^31 steps, got up to {largest:.3g}; use fewer sites"
        )
    return result


def encode(
    update: NDArray[np.floating[Any]],
    clipping_bound: float,
    noise_stddev: float,
    entropy: Entropy,
) -> NDArray[np.uint32]:
    """A clipped update with noise, in the ring of 2^32.

    Args:
        update: ``(d,)``, of L2 norm ``clipping_bound`` at most.
        clipping_bound: C.
        noise_stddev: standard deviation of one site's noise, in steps, from ``stddev``.
        entropy: of rounding and noise.

    Raises:
        ValueError: the update is longer than the bound, or not finite.
    """
    exact = update.astype(np.float64)
    norm = float(np.linalg.norm(exact))
    # A little more than the bound is what clipping in float32 leaves; it is scaled down here.
    if not norm <= clipping_bound * (1 + 1e-5):
        raise ValueError(
            f"update: must have an L2 norm of {clipping_bound:g} at most, got {norm:g}"
        )
    exact *= steps_a_unit(clipping_bound) * min(1.0, clipping_bound / max(norm, 1e-300))
    result = rounded(exact, sensitivity(update.size), entropy)
    result += table(noise_stddev).sample(update.size, entropy)
    return result.astype(np.uint32)


def rounded(exact: NDArray[np.float64], max_norm: float, entropy: Entropy) -> NDArray[np.int64]:
    """Round up or down at random, with the right mean, until the vector is short enough.

    Args:
        exact: ``(d,)``, in steps.
        max_norm: bound on the L2 norm, in steps, from ``sensitivity``.
        entropy: where the random bits come from.

    Raises:
        ValueError: it does not become short enough.
    """
    for _ in range(_TRIES):
        uniform = (entropy.uint64(exact.size) >> np.uint64(64 - _BITS)) * 2.0**-_BITS
        result = np.floor(exact + uniform).astype(np.int64)
        # Exact in float64: every square is a whole number below 2^53, and so is their sum, or nearly.
        if math.sqrt(float(np.square(result.astype(np.float64)).sum())) <= max_norm:
            return result
    raise ValueError(f"update: must become short enough in {_TRIES} roundings, did not")
