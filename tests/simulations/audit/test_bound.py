"""The one-run bound: its published values, and how it moves."""

import math

import pytest

from fedge.simulations.audit.bound import lower_bound, p_value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((500, 100, 100, 1e-5, 0.05), 3.4792),
        ((500, 100, 100, 1e-5, 0.01), 3.0232),
        ((1000, 400, 400, 1e-5, 0.05), 4.8636),
    ],
)
def test_published_values(given, expected):
    assert lower_bound(*given) == pytest.approx(expected, abs=5e-5)


def test_without_delta_it_is_that_of_a_binomial_share():
    # All of r right: (e^eps / (1 + e^eps))^r = p.
    share = 0.05 ** (1 / 100)
    assert lower_bound(100, 100, 100, 0) == pytest.approx(math.log(share / (1 - share)), abs=1e-6)


def test_more_right_guesses_never_prove_less():
    found = [lower_bound(200, 80, v, 1e-5) for v in range(81)]
    assert found == sorted(found)
    assert found[40] == 0 < found[60] < found[80]


def test_a_larger_delta_more_canaries_or_more_confidence_prove_less():
    plain = lower_bound(500, 100, 95, 1e-5)
    assert lower_bound(500, 100, 95, 1e-3) < plain
    assert lower_bound(5000, 100, 95, 1e-5) < plain
    assert lower_bound(500, 100, 95, 1e-5, 0.01) < plain


def test_what_is_proved_is_ruled_out_and_a_little_more_is_not():
    bound = lower_bound(500, 100, 95, 1e-5)
    assert p_value(500, 100, 95, bound, 1e-5) < 0.05 <= p_value(500, 100, 95, bound + 1e-6, 1e-5)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((10, 11, 5, 0), "guesses: must be 0 to 10, got 11"),
        ((10, 5, 6, 0), "correct: must be 0 to 5, got 6"),
        ((10, 5, -1, 0), "correct: must be 0 to 5, got -1"),
        ((10, 5, 5, 1.5), "delta: must be 0 to 1, got 1.5"),
        ((10, 5, 5, 0, 0.0), "p: must be above 0 and below 1, got 0.0"),
    ],
)
def test_what_is_refused(given, named):
    with pytest.raises(ValueError, match=named):
        lower_bound(*given)
