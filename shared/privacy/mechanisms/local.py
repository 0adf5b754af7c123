"""Noise that a site adds to its update by itself, so that no one needs to be trusted: local differential privacy.

Anyone who reads the update can hardly tell what data the site has: all may be replaced by others. Two updates of
L2 norm C are up to 2C apart, so 2C is the sensitivity, and the noise has a standard deviation of noise_multiplier * 2C
a coordinate: the Gaussian mechanism, accounted exactly (Balle and Wang 2018, https://arxiv.org/abs/1805.06530).

What leaves is a whole number of grid steps a coordinate, so that no float's low bits tell anything: the update is
rounded at random, never to more than ``distributed.sensitivity``, and twice that is what the noise is a multiple of.
Adding the round's weights, which everybody knows, and rounding to the model's type come after, and cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared.privacy.mechanisms import distributed
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.discrete_gaussian import MAX_SIGMA, table
from fedge.shared.privacy.mechanisms.update_norm import finite_norm

#: By how much rounding may lengthen an update, and so enlarge its noise, where the noise's table allows it.
_LENGTHENED: Final = 1.001
#: Standard deviations of a coordinate by which the noise's norm is above the usual one, once in 10^14 updates.
_TAIL_STDDEVS: Final = 8.0


def steps(noise_multiplier: float, size: int) -> int:
    """Steps of the grid to the clipping bound: the fewest that are fine enough, as the noise's table grows with them.

    Where that table would become too large they are fewer, and the noise is more.

    Args:
        noise_multiplier: standard deviation of the noise, by the sensitivity.
        size: coordinates.
    """

    def coarse(grid: int) -> bool:
        few = _stddev(noise_multiplier, size, grid) < distributed.MIN_STDDEV
        return few or distributed.sensitivity(size, grid) > _LENGTHENED * grid

    result = 1
    while result < distributed.STEPS and coarse(result):
        if _stddev(noise_multiplier, size, 2 * result) > MAX_SIGMA:
            break
        result *= 2
    return result


def stddev(noise_multiplier: float, size: int) -> float:
    """Standard deviation of the noise on a coordinate, in steps.

    Raises:
        ValueError: the noise is so little that the accountant's Gaussian differs from the discrete one, or too much.
    """
    result = _stddev(noise_multiplier, size, steps(noise_multiplier, size))
    if not distributed.MIN_STDDEV <= result <= MAX_SIGMA:
        raise ValueError(
            f"noise: must be {distributed.MIN_STDDEV:g} to {MAX_SIGMA:g} steps, got {result:.0f};"
            " change noise-multiplier"
        )
    return result


def noised(
    update: NDArray[np.floating[Any]],
    clipping_bound: float,
    noise_multiplier: float,
    entropy: Entropy,
) -> NDArray[np.float64]:
    """An update, scaled down to the bound where it is longer, with noise.

    Args:
        update: ``(d,)``; one that is not finite counts as zero.
        clipping_bound: C.
        noise_multiplier: standard deviation of the noise, by 2C.
        entropy: of rounding and noise.

    Returns:
        ``(d,)``, each a multiple of C / ``steps``.

    Raises:
        ValueError: the noise does not fit the grid.
    """
    exact = update.astype(np.float64)
    norm = finite_norm(exact)
    wide = stddev(noise_multiplier, exact.size)
    grid = steps(noise_multiplier, exact.size)
    exact *= min(1.0, clipping_bound / max(norm, 1e-300)) * (grid / clipping_bound)
    result = distributed.rounded(exact, distributed.sensitivity(exact.size, grid), entropy)
    result += table(wide).sample(exact.size, entropy)
    return result.astype(np.float64) * (clipping_bound / grid)


def noised_weights(
    received: Mapping[str, NDArray[Any]],
    trained: Mapping[str, NDArray[Any]] | None,
    clipping_bound: float,
    noise_multiplier: float,
    entropy: Entropy,
) -> dict[str, NDArray[Any]]:
    """The round's weights, moved by a site's noised update.

    Args:
        received: the round's.
        trained: the site's, in names, shapes and types as ``received``; None where it has no examples: then there is
            noise alone, and no one can tell.
        clipping_bound: L2 norm of the update, over all floating-point tensors together.
        noise_multiplier: standard deviation of the noise, by twice that.
        entropy: of rounding and noise.

    Returns:
        As ``received``; tensors of whole numbers, which get no noise, are as they came.

    Raises:
        ValueError: the noise does not fit the grid.
    """
    names = [name for name, a in received.items() if a.dtype.kind == "f"]
    size = sum(received[name].size for name in names)
    update = np.zeros(size)
    places: dict[str, slice] = {}
    start = 0
    for name in names:
        places[name] = slice(start, start + received[name].size)
        start = places[name].stop
        if trained is not None:
            update[places[name]] = trained[name].reshape(-1)
            update[places[name]] -= received[name].reshape(-1)
    update = noised(update, clipping_bound, noise_multiplier, entropy)
    result = {name: np.array(a) for name, a in received.items()}
    for name, place in places.items():
        a = received[name]
        result[name] = (a.astype(np.float64) + update[place].reshape(a.shape)).astype(a.dtype)
    return result


def max_update_norm(clipping_bound: float, noise_multiplier: float, size: int) -> float:
    """The L2 norm that noise of so many coordinates does not exceed, but for once in 10^14 updates.

    Without the update itself, which adds ``clipping_bound`` at most.
    """
    grid = steps(noise_multiplier, size)
    one = _stddev(noise_multiplier, size, grid) * clipping_bound / grid
    return one * (math.sqrt(size) + _TAIL_STDDEVS)


def _stddev(noise_multiplier: float, size: int, grid: int) -> float:
    return noise_multiplier * 2 * distributed.sensitivity(size, grid)
