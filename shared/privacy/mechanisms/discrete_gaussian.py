"""Noise in whole numbers: the discrete Gaussian (Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010).

N_Z(0, sigma^2) has the probability rho(k) / Z at the whole number k, rho(k) = exp(-k^2 / (2 sigma^2)). It is sampled by
inversion: a random number of 127 bits is looked up among the cumulative probabilities of the magnitude, and one bit
more is the sign. A magnitude above 0 carries the probability of both its signs, and 0 carries its own once, with
either sign: so zero is not counted twice, nothing is sampled again, and the table is half as long as the whole line's.

With 64 bits alone each probability would be off by up to 2^-64, which over the 10^6 values of a table, 10^7
coordinates and 10^3 rounds adds up to 10^-3 or so of a total variation: far above any delta. With 128 it is 10^-22.

Precision. ``_LIMBS`` limbs of 32 bits hold numbers below 1. rho(k + 1) = rho(k) r(k) and r(k + 1) = r(k) q, with r(k) =
exp(-(2k + 1) / (2 sigma^2)) and q = exp(-1 / sigma^2): first with Python's integers from row to row, then by NumPy
inside all rows at once. Each product is cut off, by less than 2^-189. After i rows and j steps r is below the true one
by less than 2^-174, rho / Z by less than 2^-157, and so a sum of at most 2^24 of them by less than 2^-133: 2^-6 of
the table's last bit. Cut to 127 bits, an entry is the true one rounded down, or one less.

Accountants assume the continuous Gaussian, from which this one's delta differs by 2 10^-6 of it at 1 000 steps a
standard deviation, by 3 % at 5, and by up to 70 % at 1: callers choose their grid fine enough.

Time is the same for every value but for memory's caches; an attacker who times one sample alone learns something, which
is why whole vectors are sampled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared.privacy.mechanisms.csprng import Entropy

MIN_SIGMA: Final = 0.125
#: The table then takes 224 MB.
MAX_SIGMA: Final = 2.0**20

_LIMBS: Final = 6
_LIMB_BITS: Final = 32
_BITS: Final = _LIMBS * _LIMB_BITS
_ONE: Final = 1 << _BITS
_LOW: Final = np.uint64(2**_LIMB_BITS - 1)
_SHIFT: Final = np.uint64(_LIMB_BITS)
#: A row's values, one after the other, and rows that are computed together.
_STEPS: Final = 256
_ROWS: Final = 1024
#: Standard deviations to the table's end: exp(-13.4^2 / 2) is 2^-129.5.
_WIDTH: Final = 13.4
#: The table's last bit, as a share of 1.
_UNIT_BITS: Final = 127
_DIGITS: Final = 80
_PI: Final = Decimal(
    "3.1415926535897932384626433832795028841971693993751058209749445923078164062862089986280348253421170679"
)
#: Values at a time: sorted, they walk through the table once.
_CHUNK: Final = 2**16


class Table:
    """The distribution for one standard deviation.

    Args:
        sigma: of the continuous Gaussian with the same exponent, ``MIN_SIGMA`` to ``MAX_SIGMA``.

    Attributes:
        sigma: as given.
        high: uint64, upper 63 bits of 2^127 P(|X| <= k) at position k, non-decreasing.
        low: uint64, the lower 64 bits.
        tail: bound on the true probability of what is beyond the largest magnitude, which is as long as the table;
            that magnitude has it, with what rounding left over.

    Raises:
        ValueError: sigma is out of its range.
    """

    def __init__(self, sigma: float) -> None:
        if not MIN_SIGMA <= sigma <= MAX_SIGMA:
            raise ValueError(f"sigma: must be {MIN_SIGMA:g} to {MAX_SIGMA:g}, got {sigma}")
        self.sigma = float(sigma)
        self.high, self.low = _cumulative(self.sigma)
        self.tail = _tail(self.sigma, self.high.size)

    def sample(self, size: int, entropy: Entropy) -> NDArray[np.int64]:
        """Independent samples, one-dimensional.

        Raises:
            ValueError: the size is negative.
        """
        return draw(self.high, self.low, size, entropy)

    def variance(self) -> float:
        """Of what ``sample`` draws, from the table's whole numbers, rounded once at the end.

        E X^2 is the sum of (2k + 1) P(|X| > k) over k from 0.
        """
        factors = np.arange(1, 2 * self.high.size, 2, dtype=np.uint64)
        total = 0
        for words, place in ((self.high, 64), (self.low, 0)):
            for limb, shift in ((words >> _SHIFT, place + _LIMB_BITS), (words & _LOW, place)):
                products = limb * factors
                upper, lower = int((products >> _SHIFT).sum()), int((products & _LOW).sum())
                total += ((upper << _LIMB_BITS) + lower) << shift
        every = (self.high.size**2) << _UNIT_BITS
        return float(Fraction(every - total, 1 << _UNIT_BITS))


@functools.lru_cache(maxsize=4)
def table(sigma: float) -> Table:
    """The table of a standard deviation; the last few are kept.

    Raises:
        ValueError: sigma is out of its range.
    """
    return Table(sigma)


def draw(
    high: NDArray[np.uint64], low: NDArray[np.uint64], size: int, entropy: Entropy
) -> NDArray[np.int64]:
    """Sample from a table of cumulative probabilities of the magnitude.

    Of a random word the lowest bit is the sign and the others are compared with ``high``. Only where they are equal to
    an entry's, which happens to one word in 2^40, a second word is taken and decides.

    Args:
        high: upper 63 bits of each entry, non-decreasing.
        low: lower 64 bits, non-decreasing where ``high`` is equal.
        size: how many.
        entropy: where the random bits come from.

    Returns:
        int64: each 0 to ``len(high)`` in magnitude, the number of entries at or below the random number.

    Raises:
        ValueError: the size is negative.
    """
    if size < 0:
        raise ValueError(f"size: must be 0 or more, got {size}")
    values = np.empty(size, np.int64)
    for start in range(0, size, _CHUNK):
        words = entropy.uint64(min(_CHUNK, size - start))
        # Sorted by the magnitude; a sorted search is several times faster than one at random.
        order = words.argsort()
        words = words[order]
        numbers = words >> np.uint64(1)
        places = high.searchsorted(numbers, side="right")
        tied = np.flatnonzero((places > 0) & (high[places - 1] == numbers))
        for index, second in zip(tied, entropy.uint64(tied.size), strict=True):
            first = high.searchsorted(numbers[index], side="left")
            among = low[first : places[index]]
            places[index] = first + among.searchsorted(second, side="right")
        negative = (words & np.uint64(1)).astype(bool)
        np.negative(places, out=places, where=negative)
        values[start : start + words.size][order] = places
    return values


def _cumulative(sigma: float) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The upper 63 and the lower 64 bits of 2^127 P(|X| <= k), for each k up to the table's end."""
    size = math.ceil(_WIDTH * sigma) + 1
    high, low = np.empty(size, np.uint64), np.empty(size, np.uint64)
    q, starts = _rows(sigma)
    # Half of P(|X| <= k) is the sum of rho / Z from 0 on, less half the first: its upper 128 bits are the entry.
    before = -(next(starts)[0] >> 1)
    q, starts = _rows(sigma)
    for start in range(0, size, _STEPS * _ROWS):
        rows = min(_ROWS, -(-(size - start) // _STEPS))
        chosen = [next(starts) for _ in range(rows)]
        density, ratio = _split([p for p, _ in chosen]), _split([r for _, r in chosen])
        sums = np.empty((_LIMBS, _STEPS, rows), np.uint64)
        running = np.zeros((_LIMBS, rows), np.uint64)
        for step in range(_STEPS):
            running += density
            sums[:, step] = _carry(running)
            density = _times(density, ratio)
            ratio = _times(ratio, q)
        offsets = []
        for total in _join(running):
            offsets.append(before % _ONE)
            before += total
        sums += _split(offsets)[:, None]
        _carry(sums)
        for words, limb in ((high, 0), (low, 2)):
            # One row after the other.
            piece = (sums[limb] << _SHIFT | sums[limb + 1]).T.reshape(-1)
            words[start : start + piece.size] = piece[: size - start]
    return high, low


def _rows(sigma: float) -> tuple[NDArray[np.uint64], Iterator[tuple[int, int]]]:
    """Q as limbs; and rho(k) / Z and r(k), times ``_ONE``, for every ``_STEPS``-th k."""
    with localcontext(Context(prec=_DIGITS)):
        exponent = -1 / (2 * Decimal(sigma) ** 2)
        first = int(_ONE / _normaliser(sigma))
        q = (2 * exponent).exp()
        # From row to row: rho times ``across``, that times ``bend``, r times the square root of ``bend`` by the steps.
        across = int(_ONE * (exponent * _STEPS**2).exp())
        bend = int(_ONE * (2 * exponent * _STEPS**2).exp())
        ratio = int(_ONE * exponent.exp())
        along = int(_ONE * (2 * exponent * _STEPS).exp())
        limbs = _split([int(_ONE * q)])

    def walk() -> Iterator[tuple[int, int]]:
        p, a, r = first, across, ratio
        while True:
            yield p, r
            p = p * a >> _BITS
            a = a * bend >> _BITS
            r = r * along >> _BITS

    return limbs, walk()


def _normaliser(sigma: float) -> Decimal:
    """Z, the sum of rho over all whole numbers; from sigma 1 on by Poisson's summation, which then takes few terms."""
    width = Decimal(sigma)
    with localcontext(Context(prec=_DIGITS)):
        if sigma < 1:
            scale, exponent = Decimal(1), -1 / (2 * width**2)
        else:
            scale, exponent = width * (2 * _PI).sqrt(), -2 * (_PI * width) ** 2
        return scale * (1 + 2 * sum((exponent * m * m).exp() for m in range(1, 30)))


def _tail(sigma: float, largest: int) -> float:
    """Bound on P(|X| > largest): both sides, as a geometric series, with Z at least 1 and sigma sqrt(2 pi)."""
    first = math.exp(-((largest + 1) ** 2) / (2 * sigma**2))
    ratio = math.exp(-(2 * largest + 3) / (2 * sigma**2))
    return 2 * first / (1 - ratio) / max(1.0, sigma * math.sqrt(2 * math.pi))


def _times(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The product of numbers below 1, each a column of limbs, the most significant first; cut off, by below 2^-189."""
    columns = max(left.shape[1], right.shape[1])
    total = np.zeros((_LIMBS + 1, columns), np.uint64)
    for index in range(_LIMBS):
        products = left[index] * right[: _LIMBS - index]
        total[index + 1 :] += products & _LOW
        products >>= _SHIFT
        total[index:_LIMBS] += products
    return _carry(total)[:_LIMBS]


def _carry(limbs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bring each limb below 2^32 again, in place; what leaves the first is dropped, so numbers are modulo 1."""
    for index in range(len(limbs) - 1, 0, -1):
        limbs[index - 1] += limbs[index] >> _SHIFT
    limbs &= _LOW
    return limbs


def _split(numbers: list[int]) -> NDArray[np.uint64]:
    """Whole numbers below ``_ONE`` as columns of limbs."""
    raw = b"".join(number.to_bytes(_BITS // 8, "big") for number in numbers)
    return np.frombuffer(raw, ">u4").reshape(-1, _LIMBS).T.astype(np.uint64)


def _join(limbs: NDArray[np.uint64]) -> list[int]:
    """The whole numbers of columns of limbs."""
    raw = limbs.T.astype(">u4").tobytes()
    width = _BITS // 8
    return [int.from_bytes(raw[at : at + width], "big") for at in range(0, len(raw), width)]
