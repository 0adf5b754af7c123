"""Correlated noise: the recursion is C's inverse, its sensitivity the worst case, and running sums have less error."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.gaussian import normal
from fedge.shared.privacy.mechanisms.toeplitz import (
    MAX_BANDS,
    Correlated,
    best_bands,
    coefficients,
    error,
    sensitivity,
)


def matrix(diagonals: NDArray[np.float64], rounds: int) -> NDArray[np.float64]:
    actual = np.zeros((rounds, rounds))
    for k, value in enumerate(diagonals):
        actual += np.diag(np.full(rounds - k, value), -k)
    return actual


def test_the_diagonals() -> None:
    assert coefficients(10, 5).tolist() == [1, 1 / 2, 3 / 8, 5 / 16, 35 / 128]
    for k, value in enumerate(coefficients(200, 200)):
        assert value == pytest.approx(math.comb(2 * k, k) / 4**k, rel=1e-12)


def test_all_bands_square_to_running_sums() -> None:
    c = matrix(coefficients(60, 60), 60)
    assert np.allclose(c @ c, np.tril(np.ones((60, 60))), atol=1e-12)


@pytest.mark.parametrize("bands", [1, 2, 3, 8, 30])
def test_the_recursion_is_the_inverse(bands: int) -> None:
    rounds, size = 30, 7
    diagonals = coefficients(rounds, bands)
    fresh = normal(rounds * size, Entropy(key=bytes(32))).reshape(rounds, size)
    noise = Correlated(diagonals, size)
    kept = fresh.copy()
    actual = np.array([noise.next(one) for one in fresh])
    assert np.allclose(actual, np.linalg.solve(matrix(diagonals, rounds), fresh), atol=1e-12)
    assert (fresh == kept).all()


def test_diagonals_of_the_callers_own() -> None:
    diagonals = np.array([2.0, 0.5, 0.0, 0.25])
    fresh = np.arange(24.0).reshape(12, 2)
    noise = Correlated(diagonals, 2)
    actual = np.array([noise.next(one) for one in fresh])
    assert np.allclose(matrix(diagonals, 12) @ actual, fresh, atol=1e-12)


def test_what_it_returned_may_be_changed() -> None:
    one, other = Correlated(coefficients(9, 4), 3), Correlated(coefficients(9, 4), 3)
    for k in range(9):
        fresh = np.full(3, k + 1.0)
        first = one.next(fresh)
        assert (first == other.next(fresh)).all()
        first.fill(99)


def test_the_memory_is_bounded() -> None:
    noise = Correlated(coefficients(1000, 5), 100)
    for _ in range(50):
        noise.next(np.ones(100))
    held = [value for value in vars(noise).values() if isinstance(value, np.ndarray)]
    assert sum(array.size for array in held) == 4 * 100 + 5


@pytest.mark.parametrize("bands", [1, 2, 4, 7])
@pytest.mark.parametrize(
    ("participations", "apart"), [(1, 1), (2, 3), (3, 2), (7, 1), (2, 5), (3, 3)]
)
def test_the_sensitivity_is_the_worst_of_all_patterns(
    bands: int, participations: int, apart: int
) -> None:
    """Every choice of up to so many rounds at least so far apart, with every choice of signs."""
    rounds = 7
    c = matrix(coefficients(rounds, bands), rounds)
    worst = 0.0
    for count in range(1, participations + 1):
        for chosen in itertools.combinations(range(rounds), count):
            if any(b - a < apart for a, b in itertools.pairwise(chosen)):
                continue
            for signs in itertools.product((1, -1), repeat=count):
                worst = max(worst, float(np.linalg.norm(c[:, chosen] @ np.array(signs))))
    actual = sensitivity(coefficients(rounds, bands), rounds, participations, apart)
    assert actual == pytest.approx(worst, rel=1e-12)


def test_with_few_bands_the_columns_do_not_overlap() -> None:
    diagonals = coefficients(100, 10)
    norm = float(np.linalg.norm(diagonals))
    assert sensitivity(diagonals, 100, 10, 10) == pytest.approx(math.sqrt(10) * norm)
    # The failing twin: the same formula with more bands than the separation claims too little.
    assert sensitivity(diagonals, 100, 20, 5) > 1.2 * math.sqrt(20) * norm


def test_independent_noise() -> None:
    one = coefficients(50, 1)
    assert sensitivity(one, 50, 9, 5) == 3.0
    assert error(one, 50, 5) == pytest.approx(1.0)


@pytest.mark.parametrize("bands", [1, 3, 20])
def test_the_error_is_that_of_the_matrices(bands: int) -> None:
    rounds, participations, apart = 20, 4, 5
    diagonals = coefficients(rounds, bands)
    c, sums = matrix(diagonals, rounds), np.tril(np.ones((rounds, rounds)))
    b = sums @ np.linalg.inv(c)
    columns = c[:, ::apart][:, :participations].sum(axis=1)
    expected = np.linalg.norm(b) * np.linalg.norm(columns)
    alone = np.linalg.norm(sums) * math.sqrt(participations)
    assert error(diagonals, rounds, participations, apart) == pytest.approx(expected / alone)


def test_the_error_is_that_of_noise_which_was_drawn() -> None:
    rounds, size, bands = 40, 3000, 12
    diagonals = coefficients(rounds, bands)
    entropy, noise = Entropy(key=bytes(32)), Correlated(diagonals, size)
    stddev = sensitivity(diagonals, rounds, 1, rounds)
    total, squares = np.zeros(size), 0.0
    for _ in range(rounds):
        total += noise.next(stddev * normal(size, entropy))
        squares += float((total**2).mean())
    measured = math.sqrt(squares / rounds) / math.sqrt((rounds + 1) / 2)
    assert measured == pytest.approx(error(diagonals, rounds), rel=0.02)


@pytest.mark.parametrize(
    ("participations", "gain", "bands"),
    [(1, 3.03, 69), (5, 2.74, 20), (10, 2.34, 10), (20, 1.88, 5)],
)
def test_the_gain_over_100_rounds(participations: int, gain: float, bands: int) -> None:
    """With the best number of bands, which for several participations is the separation."""
    actual = [error(coefficients(100, k), 100, participations) for k in range(1, 101)]
    assert 1 / min(actual) == pytest.approx(gain, abs=0.005)
    assert int(np.argmin(actual)) + 1 == bands


@pytest.mark.parametrize(
    ("diagonals", "arguments", "named"),
    [
        ([1.0, 0.5], (10, 0, 1), "participations"),
        ([1.0, 0.5], (10, 3, 5), "participations"),
        ([1.0, 0.5], (10, 1, 0), "min_separation"),
        ([1.0, 0.5], (1, 1, 1), "coefficients"),
        ([1.0, -0.5], (10, 1, 1), "coefficients"),
        ([1.0, 0.5, 0.6], (10, 1, 1), "coefficients"),
        ([0.0, 0.0], (10, 1, 1), "coefficients"),
        ([1.0, math.nan], (10, 1, 1), "coefficients"),
        ([], (10, 1, 1), "coefficients"),
    ],
)
def test_a_sensitivity_that_would_not_hold_is_refused(
    diagonals: list[float], arguments: tuple[int, int, int], named: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{named}: must be "):
        sensitivity(np.array(diagonals), *arguments)


def test_other_refusals() -> None:
    for arguments, named in (((0, 1), "rounds"), ((5, 0), "bands"), ((5, 6), "bands")):
        with pytest.raises(ValueError, match=rf"^{named}: must be "):
            coefficients(*arguments)
    with pytest.raises(ValueError, match=r"^fresh: must be 3 values, got \(4,\)$"):
        Correlated(coefficients(5, 2), 3).next(np.zeros(4))
    with pytest.raises(ValueError, match=r"^size: must be 0 or more"):
        Correlated(coefficients(5, 2), -1)
    with pytest.raises(ValueError, match=r"^participations: must be 1 or more"):
        error(coefficients(5, 2), 5, 0)


@pytest.mark.parametrize(
    ("rounds", "apart"),
    [
        (1, 1),
        (2, 2),
        (10, 3),
        (37, 5),
        (60, 2),
        (100, 2),
        (100, 3),
        (100, 20),
        (100, 50),
        (100, 100),
    ],
)
def test_the_best_number_of_bands_is_that_of_all(rounds: int, apart: int) -> None:
    times = -(-rounds // apart)
    every = [error(coefficients(rounds, k), rounds, times, apart) for k in range(1, rounds + 1)]
    assert best_bands(rounds, times, apart) == int(np.argmin(every)) + 1


def test_a_site_in_every_round_gains_nothing_by_bands() -> None:
    assert best_bands(50, 50, 1) == 1


def test_the_memory_of_a_long_run_is_bounded() -> None:
    assert best_bands(5000, 1, 5000) == MAX_BANDS


@pytest.mark.parametrize("bands", [1, 2, 5, 12])
def test_what_goes_on_after_a_crash_has_the_same_noise(bands: int) -> None:
    rounds, size = 12, 4
    fresh = normal(rounds * size, Entropy(key=bytes(32))).reshape(rounds, size)
    diagonals = coefficients(rounds, bands)
    for done in range(rounds):
        whole, resumed = Correlated(diagonals, size), Correlated(diagonals, size)
        for one in fresh[:done]:
            whole.next(one)
        kept = whole.state()
        resumed.restore(kept, whole.round)
        kept.fill(99)
        for one in fresh[done:]:
            np.testing.assert_array_equal(whole.next(one), resumed.next(one))
        assert resumed.round == rounds
        # The failing twin: noise that starts again.
        if done and bands > 1:
            expected = np.linalg.solve(matrix(diagonals, rounds), fresh)[done]
            begun = Correlated(diagonals, size).next(fresh[done])
            assert np.abs(begun - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("past", "done", "named"),
    [
        (np.zeros((1, 3)), 2, "past"),
        (np.zeros((2, 4)), 2, "past"),
        (np.zeros((2, 3), np.float32), 2, "past"),
        (np.full((2, 3), math.nan), 2, "past"),
        (np.zeros((2, 3)), -1, "rounds"),
    ],
)
def test_another_noises_state_is_refused(past: NDArray[np.float64], done: int, named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named}: must be "):
        Correlated(coefficients(9, 3), 3).restore(past, done)
