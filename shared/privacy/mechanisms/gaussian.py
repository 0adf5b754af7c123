"""Normal noise in float64, for mechanisms that add it to real numbers.

Each value is the sum of four independent normal ones, divided by 2, which is normal again; they come from Box and
Muller's transform of 53-bit uniform numbers.

What the sum protects from (Holohan and Braghin 2021, "Secure random sampling in differential privacy",
https://arxiv.org/abs/2107.10138): one uniform number a value reaches only some of the floats, and which ones differs
from input to input, so that a released value can rule inputs out by its low bits (Mironov 2012). Here 416 random bits
make two values: far too many ways to reach a float for anyone to search.

What it does not protect from: the sum of a value and its noise is rounded, on a grid that depends on their size, and
the low bits of a release in full precision may still tell something (Haney et al. 2022, "Precision-based attacks and
interval refining"). Add in float64, clip before, and release float32 or coarser; where the release can be whole
numbers, take ``discrete_gaussian``, which has no such gap. No value is beyond 17.2 standard deviations, where a normal
one is with a probability of 10^-65.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared.privacy.mechanisms.csprng import Entropy

_SUMMANDS: Final = 4
#: Pairs of values at a time: the parts then stay in a core's cache.
_CHUNK: Final = 4096
_DROPPED_BITS: Final = 12
_STEP: Final = 2.0**-52


def normal(size: int, entropy: Entropy) -> NDArray[np.float64]:
    """Independent normal values of mean 0 and variance 1.

    Args:
        size: how many.
        entropy: where the random bits come from, 64 bytes a value.

    Returns:
        float64, one-dimensional.

    Raises:
        ValueError: the size is negative.
    """
    if size < 0:
        raise ValueError(f"size: must be 0 or more, got {size}")
    values = np.empty(size)
    for start in range(0, size, 2 * _CHUNK):
        piece = values[start : start + 2 * _CHUNK]
        pairs = (piece.size + 1) // 2
        words = entropy.uint64(2 * _SUMMANDS * pairs).reshape(2, _SUMMANDS, pairs)
        # Odd multiples of 2^-53, so never 0, nor 1.
        uniform = ((words >> np.uint64(_DROPPED_BITS)).astype(np.float64) + 0.5) * _STEP
        radius = np.sqrt(-2 * np.log(uniform[0]))
        angle = 2 * math.pi * uniform[1]
        piece[:pairs] = (radius * np.cos(angle)).sum(axis=0) / 2
        piece[pairs:] = (radius * np.sin(angle)).sum(axis=0)[: piece.size - pairs] / 2
    return values
