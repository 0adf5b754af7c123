"""The discrete Gaussian: a table exact to its last bit, and draws from it that have its probabilities."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedge.shared.privacy.mechanisms import discrete_gaussian
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.discrete_gaussian import (
    MAX_SIGMA,
    MIN_SIGMA,
    Table,
    draw,
    table,
)

KEY = bytes(range(32))
UNIT = 2**127
SIZE = 300_000
#: Its table takes two groups of rows.
LARGE = 20_000.0


def entries(actual: Table) -> list[int]:
    pairs = zip(actual.high.tolist(), actual.low.tolist(), strict=True)
    return [(high << 64) + low for high, low in pairs]


@lru_cache
def exact(sigma: float, size: int) -> list[mpmath.mpf]:
    """rho(k) / Z for k from 0, by the definition alone."""
    with mpmath.workdps(70):
        rho = [
            mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * mpmath.mpf(sigma) ** 2)) for k in range(size)
        ]
        total = 2 * mpmath.fsum(rho) - 1
        return [one / total for one in rho]


def p_value(sampled: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Chi-squared of draws against the probabilities of 0, 1, -1, 2, ...: values expected less than 20 times as one."""
    largest = (probabilities.size - 1) // 2
    counts = np.bincount(sampled + largest, minlength=2 * largest + 1)
    order = np.argsort(abs(np.arange(-largest, largest + 1)), kind="stable")
    counts, expected = counts[order], probabilities * sampled.size
    rare = expected < 20
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(stats.chi2.sf(statistic, counts.size - 1))


def line(sigma: float) -> NDArray[np.float64]:
    """The exact probabilities of 0, -1, 1, -2, ... of a table's values."""
    half = np.array([float(p) for p in exact(sigma, table(sigma).high.size + 1)])
    return np.concatenate((half[:1], np.repeat(half[1:], 2)))


@pytest.mark.parametrize("sigma", [MIN_SIGMA, 0.3, 0.99, 1.0, 3.7, 19.0, 100.25])
def test_every_entry_is_the_true_one_rounded_down_or_one_less(sigma: float) -> None:
    actual = entries(Table(sigma))
    probabilities = exact(sigma, 2 * len(actual) + 20)
    with mpmath.workdps(70):
        below = mpmath.mpf(0)
        for k, entry in enumerate(actual):
            below += probabilities[k] * (2 if k else 1)
            true = int(mpmath.floor(below * UNIT))
            assert true - 1 <= entry <= true
        below += 2 * probabilities[len(actual)]
        assert 1 - below <= Table(sigma).tail * (1 + 1e-9) + mpmath.mpf(10) ** -65


@pytest.mark.parametrize("sigma", [1024.0, 5000.123, LARGE])
def test_a_large_table_adds_up_and_has_the_right_steps(sigma: float) -> None:
    """Z comes from Poisson's summation and the entries from the sum itself, so that they meet checks both."""
    actual = entries(table(sigma))
    assert 0 <= UNIT - actual[-1] <= 2
    assert actual == sorted(actual)
    with mpmath.workdps(70):
        z = mpmath.mpf(sigma) * mpmath.sqrt(2 * mpmath.pi)
        for k in [1, 2, 255, 256, 257, round(sigma), round(7 * sigma), len(actual) - 2]:
            rho = mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * mpmath.mpf(sigma) ** 2))
            assert abs(actual[k] - actual[k - 1] - 2 * UNIT * rho / z) < 2


def test_how_rows_are_grouped_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the last bit, for which there is one correct value and one below."""
    usual = entries(Table(19.0))
    for steps, rows in ((8, 4), (1, 3), (7, 1000)):
        monkeypatch.setattr(discrete_gaussian, "_STEPS", steps)
        monkeypatch.setattr(discrete_gaussian, "_ROWS", rows)
        actual = entries(Table(19.0))
        assert len(actual) == len(usual)
        assert max(abs(a - b) for a, b in zip(actual, usual, strict=True)) <= 1


@pytest.mark.parametrize("sigma", [MIN_SIGMA, 1.0, 3.7, 1000.0, LARGE])
def test_the_tail_is_below_2_to_the_128(sigma: float) -> None:
    made = table(sigma)
    assert 0 <= made.tail < 2.0**-128
    assert made.high.size <= 13.5 * sigma + 3


@pytest.mark.parametrize("sigma", [MIN_SIGMA, 0.3, 1.0, 3.7, 100.25])
def test_the_variance_is_exactly_the_table_s(sigma: float) -> None:
    made = table(sigma)
    actual = [*entries(made), UNIT]
    total = sum(k * k * (actual[k] - actual[k - 1]) for k in range(1, len(actual)))
    assert made.variance() == float(Fraction(total, UNIT))
    true = 2 * mpmath.fsum(k * k * p for k, p in enumerate(exact(sigma, len(actual))))
    assert made.variance() == pytest.approx(float(true), rel=1e-12)


def test_the_variance_of_a_large_table() -> None:
    """Beyond sigma 1 it is the continuous one's but for exp(-2 pi^2 sigma^2); below it is less."""
    assert table(LARGE).variance() == pytest.approx(LARGE**2, rel=1e-15)
    assert table(0.3).variance() < 0.1 * 0.3**2


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 3.7, 19.0, 100.25])
def test_draws_have_the_exact_probabilities(sigma: float) -> None:
    sampled = table(sigma).sample(SIZE, Entropy(key=KEY))
    assert sampled.dtype == np.int64
    assert p_value(sampled, line(sigma)) > 1e-3
    squares = sampled.astype(np.float64) ** 2
    error = np.sqrt(squares.var() / SIZE)
    assert abs(squares.mean() - table(sigma).variance()) < 3 * error
    assert abs(sampled.mean()) < 3 * np.sqrt(table(sigma).variance() / SIZE)


@pytest.mark.parametrize("sigma", [1.0, 3.7, 19.0])
def test_wrong_draws_are_caught(sigma: float) -> None:
    """A standard deviation 3 % off; and zero counted twice, as a sign for every magnitude would."""
    right = line(sigma)
    sampled = Table(1.03 * sigma).sample(SIZE, Entropy(key=KEY))
    # What is beyond the right table's end would be caught at once.
    sampled = sampled[abs(sampled) <= (right.size - 1) // 2]
    assert p_value(sampled, right) < 1e-3
    twice = right.copy()
    twice[0] *= 2
    assert p_value(table(sigma).sample(SIZE, Entropy(key=KEY)), twice / twice.sum()) < 1e-3


def test_rounding_a_normal_number_is_another_distribution() -> None:
    sampled = np.rint(0.5 * np.random.default_rng(0).standard_normal(SIZE)).astype(np.int64)
    assert p_value(sampled, line(0.5)) < 1e-3


@pytest.mark.slow
def test_draws_from_a_large_table() -> None:
    sigma, size = LARGE, 300_000
    sampled = table(sigma).sample(size, Entropy(key=KEY))
    assert abs(sampled.var() / sigma**2 - 1) < 3 * np.sqrt(2 / size)
    # Moved by a uniform half step, it is the continuous one's but for (1 / sigma)^2.
    moved = sampled + np.random.default_rng(0).random(size) - 0.5
    assert stats.kstest(moved / sigma, "norm").pvalue > 1e-3
    assert stats.kstest(1.02 * moved / sigma, "norm").pvalue < 1e-3
    assert abs(np.corrcoef(sampled[:-1], sampled[1:])[0, 1]) < 4 / np.sqrt(size)
    assert 0.49 < (sampled > 0).mean() < 0.51


class Narrow(Entropy):
    """First words of 0 to 7, so that ties are common; second words as they come."""

    def __init__(self) -> None:
        super().__init__(key=KEY)
        self.calls = 0

    def uint64(self, size: int) -> NDArray[np.uint64]:
        self.calls += 1
        words = super().uint64(size)
        return words & np.uint64(7) if self.calls % 2 else words


def test_where_high_words_are_equal_the_low_one_decides() -> None:
    """Numbers 0 to 3, each one time in four; of the 1s the low words leave 1/8, 1/2 and 3/8, of the 2s 1/4 and 3/4."""
    high = np.array([1, 1, 2, 4], np.uint64)
    low = np.array([2**61, 5 * 2**61, 2**62, 0], np.uint64)
    sampled = abs(draw(high, low, 40_000, Narrow()))
    expected = np.array([8 + 1, 4, 3 + 2, 6 + 8]) / 32
    counts = np.bincount(sampled, minlength=4)
    assert counts.size == 4
    assert stats.chisquare(counts, 40_000 * expected).pvalue > 1e-3
    # With high words alone nothing would be 1, and 0 only where the number is 0.
    assert counts[1] > 4_000
    assert counts[0] > 10_500


def test_each_side_of_a_tie() -> None:
    class Script(Entropy):
        def __init__(self, *answers: list[int]) -> None:
            super().__init__()
            self.answers = list(answers)

        def uint64(self, size: int) -> NDArray[np.uint64]:
            words = np.array(self.answers.pop(0), np.uint64)
            assert words.size == size
            return words

    high, low = np.array([9, 9, 20], np.uint64), np.array([5, 100, 2**64 - 1], np.uint64)
    for number, second, expected in [
        (8, [], 0),
        (9, [4], 0),
        (9, [5], 1),
        (9, [99], 1),
        (9, [100], 2),
        (9, [2**64 - 1], 2),
        (10, [], 2),
        (20, [2**64 - 2], 2),
        (20, [2**64 - 1], 3),
        (21, [], 3),
        (2**63 - 1, [], 3),
    ]:
        for sign in (0, 1):
            actual = draw(high, low, 1, Script([2 * number + sign], second))
            assert actual.tolist() == [-expected if sign else expected]


def test_the_same_key_makes_the_same_noise() -> None:
    made = [table(19.0).sample(100_000, Entropy(key=bytes([k]) * 32)) for k in (1, 1, 2)]
    assert (made[0] == made[1]).all()
    assert (made[0] != made[2]).any()
    fresh = [table(LARGE).sample(50, Entropy()).tolist() for _ in range(2)]
    assert fresh[0] != fresh[1]


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537])
def test_any_size(size: int) -> None:
    assert table(3.7).sample(size, Entropy()).shape == (size,)


def test_a_table_is_kept() -> None:
    assert table(3.7) is table(3.7)


@pytest.mark.parametrize("sigma", [0.0, -1.0, 0.12, MAX_SIGMA * 1.01, float("nan"), float("inf")])
def test_a_standard_deviation_out_of_range_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"^sigma: must be 0.125 to 1.04858e\+06, got "):
        Table(sigma)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^size: must be 0 or more, got -1$"):
        table(1.0).sample(-1, Entropy())
