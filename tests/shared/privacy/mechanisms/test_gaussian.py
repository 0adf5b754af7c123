"""Normal noise: the right distribution, independent values, and no infinite one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.gaussian import normal

SIZE = 300_000


@pytest.fixture(scope="module")
def sampled() -> NDArray[np.float64]:
    return normal(SIZE, Entropy(key=bytes(range(32))))


def test_it_is_normal(sampled: NDArray[np.float64]) -> None:
    assert sampled.shape == (SIZE,)
    assert sampled.dtype == np.float64
    assert stats.kstest(sampled, "norm").pvalue > 1e-3


def test_a_wrong_standard_deviation_is_caught(sampled: NDArray[np.float64]) -> None:
    assert stats.kstest(1.02 * sampled, "norm").pvalue < 1e-3
    assert abs((1.02 * sampled).var() - 1) > 3 * np.sqrt(2 / SIZE)


def test_its_moments(sampled: NDArray[np.float64]) -> None:
    """Each within three standard errors: sqrt of 1, 2, 15 - 0 and 96 over n."""
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((sampled**power).mean() - expected) < 3 * np.sqrt(variance / SIZE)


def test_its_tails(sampled: NDArray[np.float64]) -> None:
    for bound in (2.0, 3.0, 4.0):
        expected = 2 * SIZE * stats.norm.sf(bound)
        assert abs((abs(sampled) > bound).sum() - expected) < 3 * np.sqrt(expected)


@pytest.mark.parametrize("lag", [1, 2, 4095, 4096, 4097, 8192])
def test_values_are_independent(sampled: NDArray[np.float64], lag: int) -> None:
    """4096 apart are the sines and cosines of the same angles; squares too, as they share their radii."""
    one, other = sampled[:-lag], sampled[lag:]
    for power in (1, 2):
        assert abs(np.corrcoef(one**power, other**power)[0, 1]) < 4 / np.sqrt(SIZE)


def test_the_same_key_makes_the_same_noise_and_another_does_not() -> None:
    made = [normal(1000, Entropy(key=bytes([k]) * 32)) for k in (1, 1, 2)]
    assert (made[0] == made[1]).all()
    assert (made[0] != made[2]).all()
    assert (normal(1000, Entropy()) != normal(1000, Entropy())).all()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 8191, 8192, 8193, 20_001])
def test_any_size(size: int) -> None:
    values = normal(size, Entropy(key=bytes(32)))
    assert values.shape == (size,)
    assert len(np.unique(values)) == size


@pytest.mark.parametrize("word", [0, 2**64 - 1, 2**63, 2**63 - 1, 2**12 - 1])
def test_no_random_word_makes_an_infinite_value(word: int) -> None:
    class Constant(Entropy):
        def uint64(self, size: int) -> NDArray[np.uint64]:
            return np.full(size, word, np.uint64)

    values = normal(5, Constant())
    assert np.isfinite(values).all()
    assert abs(values).max() < 17.2


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^size: must be 0 or more, got -1$"):
        normal(-1, Entropy())
