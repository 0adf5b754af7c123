"""Real numbers in the ring of 2^32: fixed point, two's complement, stochastic rounding.

A value within ±bound becomes at most floor((2^31 - 1) / sites) - 1 steps either way. Rounding adds one step at most, so
the sum over all sites stays within ±(2^31 - 1): it cannot wrap, whatever the sites hold.

Rounding goes up or down at random, so that it is right on average. Of the weighted value, in units of 2^-16 of a step,
Z is the nearest whole number; 16 random bits r are added and the low 16 bits cut off. floor((Z + r) / 2^16) has exactly
the mean Z / 2^16, so that only the rounding to Z is left, at most 2^-17 of a step. The random bits are AES-256-CTR's,
under a key of the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared.crypto.keystream import keystream
from fedge.shared.errors import SiteError
from fedge.shared.secagg.masking import MAX_VALUES

#: Most sites whose sum can be encoded; 2 046 steps each are left at that many.
MAX_SITES: Final = 2**20

_MAX_INT32: Final = 2**31 - 1
_FRACTION: Final = 2.0**16
_FRACTION_BITS: Final = 16
#: Added to a float64, it leaves the nearest whole number in the low bits, in two's complement; the part above bit 48 is
#: cut off later. This is several times faster than a conversion.
_TO_WHOLE: Final = 1.5 * 2.0**52
#: Values at a time: the parts then stay in a core's cache.
_CHUNK: Final = 16_384
_NOT_FINITE: Final = 401


@dataclass(frozen=True)
class Segment:
    """A run of ``size`` coordinates which share a bound.

    Attributes:
        name: for messages.
        size: coordinates.
        bound: largest magnitude before the weight; larger values saturate. Public, the same at every site.
        grid: steps for each unit of a value, where they do not follow from the bound and the number of sites.
    """

    name: str
    size: int
    bound: float
    grid: float | None = None


@dataclass(frozen=True)
class Encoded:
    """What a site adds to the sum.

    Attributes:
        vector: uint32, one for each coordinate.
        saturated: coordinates that were beyond their bound.
    """

    vector: NDArray[np.uint32]
    saturated: int


def scale(bound: float, sites: int) -> float:
    """Steps of the ring for each unit of a value.

    Args:
        bound: largest magnitude of a value.
        sites: that add up at most; the same number for encoding and decoding, whichever drop out.

    Raises:
        ValueError: an argument is out of its range.
    """
    steps = _steps(sites)
    # Far enough from the ends of float64 that no step, nor its inverse, is 0 or infinite.
    if not 1e-200 <= bound <= 1e200:
        raise ValueError(f"bound: must be 1e-200 to 1e200, got {bound}")
    return steps / bound


def encode(
    values: NDArray[np.floating[Any]],
    weight: float,
    segments: Sequence[Segment],
    sites: int,
    rounding_key: bytes,
    out: NDArray[np.uint32] | None = None,
) -> Encoded:
    """Clamp each value to its bound, multiply by the weight, and round into the ring.

    Args:
        values: one-dimensional float32 or float64, as long as the segments together.
        weight: 0 to 1; with 0 every coordinate is 0.
        segments: the bounds, in the order of the values.
        sites: that add up at most.
        rounding_key: 32 bytes, for this vector only.
        out: where the vector is written, as long as the values; new where not given.

    Returns:
        The vector, and how many values were beyond their bound.

    Raises:
        SiteError: 401, a value is NaN or infinite.
        ValueError: an argument is out of its range.
    """
    if values.ndim != 1 or values.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"values: must be one-dimensional float32 or float64, got {values.ndim}-dimensional {values.dtype}"
        )
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: must be 0 to 1, got {weight}")
    _require_sizes(segments, values.size)
    if out is not None and (out.shape != values.shape or out.dtype != np.uint32):
        raise ValueError(
            f"out: must be {values.size} values of uint32, got {out.shape} of {out.dtype}"
        )
    scales = [scale(segment.bound, sites) for segment in segments]
    most = _steps(sites)
    encoder = _Encoder(rounding_key)
    vector = np.empty(values.size, np.uint32) if out is None else out
    saturated = start = 0
    for segment, steps in zip(segments, scales, strict=True):
        end = start + segment.size
        factor = weight * steps
        if factor * segment.bound > most * (1 + 1e-15):
            raise ValueError(f"{segment.name}: must stay within {most} steps, got more")
        for at in range(start, end, _CHUNK):
            part = slice(at, min(at + _CHUNK, end))
            saturated += encoder.run(values[part], factor, segment, vector[part])
        start = end
    encoder.wipe()
    return Encoded(vector, saturated)


def decode(
    total: NDArray[np.uint32],
    segments: Sequence[Segment],
    sites: int,
    weight: float = 1.0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """The sum of weight times value over the sites, or their weighted mean, from the sum of their vectors.

    Args:
        total: one-dimensional uint32, added modulo 2^32, without masks.
        segments: of ``encode``.
        sites: of ``encode``, not the number of those that are left.
        weight: what the sum is divided by, above 0: the sum of the weights for a mean.
        out: where the values are written, float64 or float32, as long as the vector; new float64 where not given.

    Raises:
        ValueError: an argument is out of its range.
    """
    if total.ndim != 1 or total.dtype != np.uint32:
        raise ValueError(
            f"total: must be one-dimensional uint32, got {total.ndim}-dimensional {total.dtype}"
        )
    _require_sizes(segments, total.size)
    if not 0 < weight < math.inf:
        raise ValueError(f"weight: must be above 0 and finite, got {weight}")
    if out is not None and (out.shape != total.shape or out.dtype not in (np.float32, np.float64)):
        raise ValueError(f"out: must be {total.size} floats, got {out.shape} of {out.dtype}")
    signed = total.view(np.int32)
    found = np.empty(total.size) if out is None else out
    start = 0
    for segment in segments:
        part = slice(start, start + segment.size)
        factor = 1 / ((segment.grid or scale(segment.bound, sites)) * weight)
        # In two steps, which is faster than NumPy's conversion on the way.
        found[part] = signed[part]
        found[part] *= factor
        start = part.stop
    return found


def _steps(sites: int) -> int:
    """Most steps of one site: ``sites`` times one step more is still within the ring's positive half."""
    if type(sites) is not int or not 1 <= sites <= MAX_SITES:
        raise ValueError(f"sites: must be 1 to {MAX_SITES}, got {sites}")
    return _MAX_INT32 // sites - 1


def _require_sizes(segments: Sequence[Segment], size: int) -> None:
    if any(segment.size < 0 for segment in segments):
        raise ValueError("segments: must have sizes of 0 or more, got a negative one")
    together = sum(segment.size for segment in segments)
    if together != size:
        raise ValueError(f"segments: must have {size} coordinates together, got {together}")
    if size > MAX_VALUES:
        raise ValueError(f"values: must be up to {MAX_VALUES}, got {size}")


class _Encoder:
    """The working memory of one call, and its random bits."""

    def __init__(self, key: bytes) -> None:
        self._update = keystream(key).update_into
        self._zeros = memoryview(bytes(2 * _CHUNK))
        self._random = np.empty(_CHUNK + 8, np.uint16)
        self._room = self._random.view(np.uint8).data
        self._exact = np.empty(_CHUNK, np.float64)

    def run(
        self,
        values: NDArray[np.floating[Any]],
        factor: float,
        segment: Segment,
        out: NDArray[np.uint32],
    ) -> int:
        """Encode up to ``_CHUNK`` values into ``out``; returns how many saturated."""
        highest, lowest = float(values.max()), float(values.min())
        if not math.isfinite(highest) or not math.isfinite(lowest):
            raise SiteError(_NOT_FINITE, f"{segment.name}: must be finite, got NaN or infinity")
        exact = self._exact[: values.size]
        exact[...] = values
        saturated = 0
        if highest > segment.bound or lowest < -segment.bound:
            # In float64: a bound rounded to float32 could lie above the real one.
            clamped = exact.clip(-segment.bound, segment.bound)
            saturated = int(np.count_nonzero(clamped != exact))
            exact[...] = clamped
        exact *= factor * _FRACTION
        exact += _TO_WHOLE
        whole = exact.view(np.int64)
        self._update(self._zeros[: 2 * values.size], self._room)
        whole += self._random[: values.size]
        # Bits 16 to 47 are the rounded number modulo 2^32.
        whole >>= _FRACTION_BITS
        out[...] = whole
        return saturated

    def wipe(self) -> None:
        """Forget the last values and random bits."""
        self._exact.fill(0)
        self._random.fill(0)
