"""Correlated noise for running sums: a banded Toeplitz factorisation (DP-MF).

A model after t rounds is the sum of t updates. Noise that is independent in each round adds up in it; noise of which
later rounds take a part back adds up to less, at the same privacy. With A the lower triangle of ones (running sums) and
C lower triangular, the mechanism releases the updates plus C^-1 z, z independent with a standard deviation of
noise_multiplier times the sensitivity of C (Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization",
https://arxiv.org/abs/2306.08153). The whole run is one Gaussian release at that noise multiplier.

C is A's square root, whose diagonals are 1, 1/2, 3/8, ..., cut to its first bands (Kalinin and Lampert 2024, "Banded
square root matrix factorization", https://arxiv.org/abs/2405.13763). A site that takes part in several rounds must be
kept ``min_separation`` rounds apart: that is a promise of the caller's on which the privacy rests.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

#: Rounds that noise is correlated over at most where no number is set: each is a vector in memory and on the disk.
MAX_BANDS: Final = 1000

#: Numbers of bands that are tried first: each larger by this factor, and so many multiples of the separation.
_GROWTH: Final = 1.15
_MULTIPLES: Final = 8


def coefficients(rounds: int, bands: int) -> NDArray[np.float64]:
    """The diagonals of C from the main one down: binom(-1/2, k) (-1)^k = binom(2k, k) / 4^k.

    Args:
        rounds: of the run, 1 or more.
        bands: how many diagonals are not 0, 1 to ``rounds``; 1 is independent noise.

    Returns:
        float64, as long as ``bands``.

    Raises:
        ValueError: an argument is out of its range.
    """
    if rounds < 1:
        raise ValueError(f"rounds: must be 1 or more, got {rounds}")
    if not 1 <= bands <= rounds:
        raise ValueError(f"bands: must be 1 to {rounds}, got {bands}")
    index = np.arange(1.0, bands)
    values: NDArray[np.float64] = np.concatenate(([1.0], 1 - 0.5 / index)).cumprod(dtype=np.float64)
    return values


def sensitivity(
    coefficients: NDArray[np.float64], rounds: int, participations: int, min_separation: int
) -> float:
    """Largest L2 norm of what one participant adds to C x, where each of its updates has a norm of at most 1.

    It is the norm of the sum of the columns 0, s, 2s, ... of C, s the minimum separation. This is exact where the
    diagonals are 0 or more and do not grow, which is required, for participation in up to so many rounds, each at least
    s after the one before (Kalinin and Lampert 2024); and for fixed epochs, every s-th round exactly, which
    is the case that attains it. With no more bands than s the columns do not overlap, and it is
    sqrt(participations) times the norm of the diagonals.

    Args:
        coefficients: the diagonals, the first above 0.
        rounds: of the run, as many as there are diagonals or more.
        participations: rounds in which one takes part at most.
        min_separation: smallest distance of two of them, in rounds.

    Raises:
        ValueError: an argument is out of its range, or so many participations are impossible in the run.
    """
    _require_diagonals(coefficients, rounds)
    if (np.diff(coefficients) > 0).any() or coefficients[-1] < 0:
        raise ValueError("coefficients: must be 0 or more and not grow, got others")
    if min_separation < 1:
        raise ValueError(f"min_separation: must be 1 or more, got {min_separation}")
    possible = -(-rounds // min_separation)
    if not 1 <= participations <= possible:
        raise ValueError(f"participations: must be 1 to {possible}, got {participations}")
    column = np.zeros(rounds)
    for start in range(0, participations * min_separation, min_separation):
        end = min(start + coefficients.size, rounds)
        column[start:end] += coefficients[: end - start]
    return math.sqrt(float(column @ column))


def error(
    coefficients: NDArray[np.float64],
    rounds: int,
    participations: int = 1,
    min_separation: int | None = None,
) -> float:
    """Root mean squared error of the running sums, over that of independent noise at the same privacy.

    Args:
        coefficients: the diagonals.
        rounds: of the run.
        participations: rounds in which one takes part at most.
        min_separation: smallest distance of two of them; rounds / participations, rounded down, where not given.

    Returns:
        Below 1 where correlated noise is the better one.

    Raises:
        ValueError: as ``sensitivity``.
    """
    if participations < 1:
        raise ValueError(f"participations: must be 1 or more, got {participations}")
    apart = max(1, rounds // participations) if min_separation is None else min_separation
    correlated = sensitivity(coefficients, rounds, participations, apart) * _spread(
        coefficients, rounds
    )
    # Independent noise: C = 1, so sqrt(participations) times the root of the mean of 1, ..., rounds.
    return correlated / math.sqrt(participations * (rounds + 1) / 2)


def best_bands(rounds: int, participations: int, min_separation: int) -> int:
    """The number of bands with the smallest ``error``, up to ``MAX_BANDS``.

    The error falls and rises between one multiple of the separation and the next, where columns begin to overlap; so
    the multiples are tried, some numbers in between, and then what lies about the best of them.

    Raises:
        ValueError: as ``sensitivity``.
    """
    max_bands = min(rounds, MAX_BANDS)

    def error_of(bands: int) -> float:
        return error(coefficients(rounds, bands), rounds, participations, min_separation)

    candidates, bands = {max_bands}, 1
    while bands < max_bands:
        candidates.add(bands)
        bands = max(bands + 1, math.ceil(bands * _GROWTH))
    candidates |= {
        k * min_separation for k in range(1, _MULTIPLES + 1) if k * min_separation <= max_bands
    }
    errors = {bands: error_of(bands) for bands in sorted(candidates)}
    while True:
        best = min(errors, key=lambda bands: (errors[bands], bands))
        below = max((n for n in errors if n < best), default=best)
        above = min((n for n in errors if n > best), default=best)
        between = {(below + best) // 2, (best + above + 1) // 2} - errors.keys()
        if not between:
            return best
        errors |= {bands: error_of(bands) for bands in between}


def _spread(coefficients: NDArray[np.float64], rounds: int) -> float:
    """Root mean squared error of the running sums of C^-1 z for z of variance 1: the rows of A C^-1."""
    inverse = np.zeros(rounds)
    inverse[0] = 1 / coefficients[0]
    for index in range(1, rounds):
        earlier = inverse[max(0, index - coefficients.size + 1) : index][::-1]
        inverse[index] = -(coefficients[1 : earlier.size + 1] @ earlier) / coefficients[0]
    # Row t of A C^-1 holds the first t running sums of that.
    squares = np.cumsum(inverse) ** 2
    return math.sqrt(float(np.cumsum(squares).mean()))


class Correlated:
    """The noise of one round after the other, C^-1 z, in the memory of ``bands - 1`` vectors.

    What it keeps is past noise: as secret as the updates, and needed to go on after a crash. Starting again in the
    middle of a run is not the mechanism that was accounted for.

    Args:
        coefficients: the diagonals of C, the first above 0.
        size: of a vector.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, coefficients: NDArray[np.float64], size: int) -> None:
        _require_diagonals(coefficients, coefficients.size)
        if size < 0:
            raise ValueError(f"size: must be 0 or more, got {size}")
        self._coefficients = coefficients.astype(np.float64)
        # Of the last rounds, each at its number modulo their count.
        self._past = np.zeros((coefficients.size - 1, size))
        self._size, self._round = size, 0

    @property
    def round(self) -> int:
        """How many rounds have had their noise."""
        return self._round

    def state(self) -> NDArray[np.float64]:
        """The noise of the last rounds, ``(bands - 1, size)``: all that is needed to go on, beside ``round``."""
        return self._past.copy()

    def restore(self, past: NDArray[np.float64], rounds: int) -> None:
        """Go on after so many rounds from what ``state`` gave then.

        Raises:
            ValueError: it is of other bands or another size, not finite, or the rounds are fewer than none.
        """
        if past.shape != self._past.shape or past.dtype != np.float64:
            raise ValueError(
                f"past: must be {self._past.shape} of float64, got {past.shape} of {past.dtype}"
            )
        if not np.isfinite(past).all():
            raise ValueError("past: must be finite, got NaN or infinity")
        if rounds < 0:
            raise ValueError(f"rounds: must be 0 or more, got {rounds}")
        self._past[:] = past
        self._round = rounds

    def next(self, fresh: NDArray[np.float64]) -> NDArray[np.float64]:
        """The noise of the next round.

        Args:
            fresh: z of this round: independent, of the standard deviation that the privacy asks for; not changed.

        Raises:
            ValueError: it is not a vector of the size.
        """
        if fresh.shape != (self._size,):
            raise ValueError(f"fresh: must be {self._size} values, got {fresh.shape}")
        noise = fresh.astype(np.float64)
        bands = self._coefficients.size
        for back in range(1, min(self._round, bands - 1) + 1):
            noise -= self._coefficients[back] * self._past[(self._round - back) % (bands - 1)]
        noise /= self._coefficients[0]
        if bands > 1:
            self._past[self._round % (bands - 1)] = noise
        self._round += 1
        return noise


def _require_diagonals(coefficients: NDArray[np.float64], rounds: int) -> None:
    if coefficients.ndim != 1 or not 1 <= coefficients.size <= rounds:
        raise ValueError(f"coefficients: must be 1 to {rounds}, got {coefficients.shape}")
    if not np.isfinite(coefficients).all() or not coefficients[0] > 0:
        raise ValueError("coefficients: must be finite and the first above 0, got others")
