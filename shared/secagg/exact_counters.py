"""Exact counters inside a vector over the ring 2^32.

A counter's value is a fixed-point integer less the counter's ``low``, so never negative and at most 2^60. It travels as
three limbs of 20 bits, lowest first, and each limb's sum over up to 2 048 sites stays below 2^32. The counter's sum is
therefore exact, whatever the sites hold within its range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared.errors import RunError, SiteError

LIMBS: Final = 3
#: Most sites whose counters add up exactly.
MAX_SITES: Final = 2048
#: Largest distance between ``low`` and ``high``, in units of the last fraction bit.
MAX_RANGE: Final = 2**60

_BITS: Final = 20
_MASK: Final = 2**_BITS - 1
_OUT_OF_RANGE: Final = 401
_IMPOSSIBLE: Final = 511


@dataclass(frozen=True)
class Counter:
    """One counter, the same at every site.

    Attributes:
        name: of the counter.
        low: smallest value of one site.
        high: largest value of one site.
        fraction_bits: 0 for whole numbers; else values are rounded to multiples of 2^-fraction_bits.

    Raises:
        ValueError: the range is empty or too wide.
    """

    name: str
    low: int
    high: int
    fraction_bits: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction_bits <= 60:
            raise ValueError(
                f"{self.name}: must have 0 to 60 fraction bits, got {self.fraction_bits}"
            )
        if not 0 < (self.high - self.low) << self.fraction_bits <= MAX_RANGE:
            raise ValueError(
                f"{self.name}: must have a range of up to 2^60 units above its low end, "
                f"got {self.low} to {self.high} with {self.fraction_bits} fraction bits"
            )

    @property
    def span(self) -> int:
        """The distance from ``low`` to ``high`` in units."""
        return (self.high - self.low) << self.fraction_bits


def size(counters: Sequence[Counter]) -> int:
    """Coordinates that the counters take."""
    return LIMBS * len(counters)


def encode_counters(
    values: Mapping[str, float | int], counters: Sequence[Counter]
) -> NDArray[np.uint32]:
    """One site's counters as limbs.

    Args:
        values: by name, exactly those of ``counters``.
        counters: in the order of the vector.

    Returns:
        ``(size(counters),)`` uint32.

    Raises:
        SiteError: 401, a value is NaN, infinite, out of its range, or no whole number where one is due.
        ValueError: a name is missing, unknown or twice.
    """
    names = [counter.name for counter in counters]
    if len(set(names)) != len(names) or set(names) != set(values):
        odd = sorted(set(names) ^ set(values)) or "one twice"
        raise ValueError(f"counters: must be named as the values are, got {odd}")
    found = np.empty(size(counters), np.uint32)
    for i, counter in enumerate(counters):
        rest = _units(counter, values[counter.name]) - (counter.low << counter.fraction_bits)
        # Only the last limb can be 2^20 itself, at the very end of the widest range; there is room for that.
        found[LIMBS * i : LIMBS * (i + 1)] = (
            rest & _MASK,
            rest >> _BITS & _MASK,
            rest >> 2 * _BITS,
        )
    return found


def decode_counters(
    total: NDArray[np.uint32], counters: Sequence[Counter], sites: int
) -> dict[str, float]:
    """The sum of each counter.

    Args:
        total: ``(size(counters),)`` uint32, added modulo 2^32, without masks.
        counters: of ``encode_counters``.
        sites: how many added up, which is needed to take every ``low`` off again.

    Returns:
        The sums by name: ``int`` where there are no fraction bits, else the float nearest to the exact sum.

    Raises:
        RunError: 511, limbs or a sum that no ``sites`` honest sites can give.
        ValueError: the shape or type is wrong, or there are too many sites.
    """
    if type(sites) is not int or not 1 <= sites <= MAX_SITES:
        raise ValueError(f"sites: must be 1 to {MAX_SITES}, got {sites}")
    if total.shape != (size(counters),) or total.dtype != np.uint32:
        raise ValueError(
            f"total: must be {size(counters)} values of uint32, got {total.shape} of {total.dtype}"
        )
    limbs = [int(limb) for limb in total]
    found: dict[str, float] = {}
    for i, counter in enumerate(counters):
        low, middle, high = limbs[LIMBS * i : LIMBS * (i + 1)]
        units = low + (middle << _BITS) + (high << 2 * _BITS)
        if max(low, middle) > sites * _MASK or units > sites * counter.span:
            raise RunError(
                _IMPOSSIBLE, f"{counter.name}: must be within {sites} times its range, got more"
            )
        units += sites * (counter.low << counter.fraction_bits)
        found[counter.name] = (
            units / (1 << counter.fraction_bits) if counter.fraction_bits else units
        )
    return found


def _units(counter: Counter, value: float | int) -> int:
    """The value in units of the last fraction bit, the nearest one."""
    if not counter.low <= value <= counter.high:
        kind = "NaN" if value != value else "a value outside"
        raise SiteError(
            _OUT_OF_RANGE, f"{counter.name}: must be {counter.low} to {counter.high}, got {kind}"
        )
    # Both ways are exact up to the one rounding: integers are shifted, floats gain in exponent only.
    if isinstance(value, int | np.integer):
        return int(value) << counter.fraction_bits
    scaled = math.ldexp(float(value), counter.fraction_bits)
    if counter.fraction_bits == 0 and not scaled.is_integer():
        raise SiteError(_OUT_OF_RANGE, f"{counter.name}: must be a whole number, got a fraction")
    return round(scaled)
