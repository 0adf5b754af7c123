"""Exact counters over the ring 2^128.

A counter's value is a fixed-point integer less the counter's ``low``, so never negative and at most 2^60: the sum over
up to 2 048 sites stays far below 2^128, and is exact whatever the sites hold within its range. Each counter is one
element of the ring. In several parts, each with a sum of its own, the sums would tell more than the counter's: the
carries between them depend on the single sites, and under noise they would be a release that no accountant has proved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared.errors import RunError, SiteError

#: Most sites whose counters add up exactly.
MAX_SITES: Final = 2048
#: Largest distance between ``low`` and ``high``, in units of the last fraction bit.
MAX_RANGE: Final = 2**60

_HALF: Final = 64

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


def encode_counters(
    values: Mapping[str, float | int], counters: Sequence[Counter]
) -> NDArray[np.uint64]:
    """One site's counters in the ring.

    Args:
        values: by name, exactly those of ``counters``.
        counters: in the order of the vector.

    Returns:
        ``(len(counters), 2)`` uint64: the low half of each element, and the high one.

    Raises:
        SiteError: 401, a value is NaN, infinite, out of its range, or no whole number where one is due.
        ValueError: a name is missing, unknown or twice.
    """
    names = [counter.name for counter in counters]
    if len(set(names)) != len(names) or set(names) != set(values):
        odd = sorted(set(names) ^ set(values)) or "one twice"
        raise ValueError(f"counters: must be named as the values are, got {odd}")
    found = np.zeros((len(counters), 2), np.uint64)
    for i, c in enumerate(counters):
        # Of one site never more than the low half: the high one is there for the sum, and for the masks.
        found[i, 0] = _units(c, values[c.name]) - (c.low << c.fraction_bits)
    return found


def decode_counters(
    total: NDArray[np.uint64], counters: Sequence[Counter], sites: int
) -> dict[str, float]:
    """The sum of each counter.

    Args:
        total: ``(len(counters), 2)`` uint64 as of ``encode_counters``, added modulo 2^128, without masks.
        counters: of ``encode_counters``.
        sites: how many added up, which is needed to take every ``low`` off again.

    Returns:
        The sums by name: ``int`` where there are no fraction bits, else the float nearest to the exact sum.

    Raises:
        RunError: 511, a sum that no ``sites`` honest sites can give.
        ValueError: the shape or type is wrong, or there are too many sites.
    """
    if type(sites) is not int or not 1 <= sites <= MAX_SITES:
        raise ValueError(f"sites: must be 1 to {MAX_SITES}, got {sites}")
    if total.shape != (len(counters), 2) or total.dtype != np.uint64:
        raise ValueError(
            f"total: must be {len(counters)} pairs of uint64, got {total.shape} of {total.dtype}"
        )
    found: dict[str, float] = {}
    for counter, (low, high) in zip(counters, total.tolist(), strict=True):
        units = low + (high << _HALF)
        if units > sites * counter.span:
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
