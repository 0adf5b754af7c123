"""Poisson sampling: independent coins with exactly the rate, from the operating system."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from fedge.shared.privacy.mechanisms.poisson_sampling import poisson

NAMES = [f"site-{k}" for k in range(40)]


class Fixed(random.SystemRandom):
    """The operating system's interface over a generator with a seed; or over given answers."""

    def __init__(self, seed: int = 0, answer: int | None = None) -> None:
        super().__init__()
        self.generator, self.answer = random.Random(seed), answer
        self.bits: set[int] = set()

    def getrandbits(self, k: int) -> int:
        self.bits.add(k)
        return self.generator.getrandbits(k) if self.answer is None else self.answer


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_the_number_drawn_is_binomial_and_a_fixed_number_is_caught(rate: float) -> None:
    system, rounds = Fixed(1), 3000
    sampled = [poisson(NAMES, rate, system) for _ in range(rounds)]
    sizes = np.bincount([len(one) for one in sampled], minlength=41)
    expected = rounds * stats.binom.pmf(np.arange(41), 40, rate)
    usual = expected >= 5
    observed = np.append(sizes[usual], sizes[~usual].sum())
    wanted = np.append(expected[usual], expected[~usual].sum())
    assert ((observed - wanted) ** 2 / wanted).sum() < stats.chi2.isf(1e-3, observed.size - 1)
    fixed = np.zeros(observed.size)
    fixed[int(np.argmax(observed))] = rounds
    assert ((fixed - wanted) ** 2 / wanted).sum() > stats.chi2.isf(1e-3, observed.size - 1)


def test_each_is_drawn_as_often_and_independently() -> None:
    system, rounds, rate = Fixed(2), 4000, 0.25
    taken = np.zeros((rounds, 40))
    for row in taken:
        row[[NAMES.index(name) for name in poisson(NAMES, rate, system)]] = 1
    error = np.sqrt(rate * (1 - rate) / rounds)
    assert abs(taken.mean(axis=0) - rate).max() < 4 * error
    pairs = np.corrcoef(taken.T)[np.triu_indices(40, 1)]
    assert abs(pairs).max() < 4.5 / np.sqrt(rounds)
    # Without replacement and of a fixed size, each pair would be correlated by -1 / 39.
    assert abs(pairs.mean()) < 0.005 < 1 / 39


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 1e-9, 5e-324, 0.5, 1.0, 1 - 2**-53])
def test_the_comparison_is_exact(rate: float) -> None:
    """The last number below the threshold is in, the threshold itself is out."""
    share, whole = rate.as_integer_ratio()
    system = Fixed(answer=share - 1)
    assert poisson(["a"], rate, system) == ["a"]
    assert system.bits == {whole.bit_length() - 1}
    assert Fraction(share, 2 ** system.bits.pop()) == Fraction(rate)
    if rate < 1:
        assert poisson(["a"], rate, Fixed(answer=share)) == []


def test_a_tenth_takes_more_than_53_bits() -> None:
    system = Fixed()
    poisson(NAMES, 0.1, system)
    assert system.bits == {55}


def test_the_order_is_kept_and_a_rate_of_1_takes_all() -> None:
    assert poisson(NAMES, 1.0) == NAMES
    sampled = poisson(NAMES, 0.5)
    assert sampled == [name for name in NAMES if name in set(sampled)]


def test_the_sample_may_be_empty() -> None:
    assert poisson(NAMES, 1e-300) == []
    assert poisson([], 0.5) == []


def test_without_a_generator_it_is_the_operating_system_s() -> None:
    state = random.getstate()
    random.seed(0)
    first = [poisson(NAMES, 0.5) for _ in range(5)]
    random.seed(0)
    second = [poisson(NAMES, 0.5) for _ in range(5)]
    random.setstate(state)
    assert first != second


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"^sampling_rate: must be above 0 and up to 1, got "):
        poisson(NAMES, rate)


def test_a_name_twice_is_refused_for_it_would_be_drawn_more_often() -> None:
    with pytest.raises(ValueError, match=r"^names: must be each there once"):
        poisson(["a", "b", "a"], 0.5)


def test_a_generator_for_simulations_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^system: must be a SystemRandom, got Random$"):
        poisson(NAMES, 0.5, random.Random(1))  # type: ignore[arg-type]
