"""A sum in whole numbers: no update is longer than the bound, nothing is lost beside the noise, order is nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as vectors

from fedge.server.aggregation.integer_grid import (
    MAX_STDDEV,
    MIN_STDDEV,
    IntegerGrid,
    difference,
    floating,
    grid,
    moved,
    on_grid,
)

Arrays = dict[str, np.ndarray[Any, Any]]


def placed(update: np.ndarray[Any, Any], integer_grid: IntegerGrid) -> np.ndarray[Any, Any]:
    return on_grid(update, float(np.linalg.norm(update)), integer_grid)


@pytest.mark.parametrize("size", [1, 100, 20_000, 10_000_000])
@pytest.mark.parametrize("noise_multiplier", [1e-6, 0.1, 1.0, 5.0, 1e4])
def test_the_noise_is_what_was_asked_for_on_any_grid(noise_multiplier: float, size: int) -> None:
    integer_grid = grid(2.0, noise_multiplier, size)
    assert MIN_STDDEV <= integer_grid.stddev <= MAX_STDDEV
    assert integer_grid.stddev * integer_grid.step == pytest.approx(
        noise_multiplier * 2.0, rel=1e-12
    )
    assert integer_grid.sensitivity_steps * integer_grid.step == pytest.approx(2.0, rel=1e-12)
    if noise_multiplier <= 5:
        # The mean coordinate of an update at the bound.
        assert integer_grid.sensitivity_steps / np.sqrt(size) >= 15


@pytest.mark.slow
@given(
    vectors(np.float64, st.integers(1, 40), elements=st.floats(-1e9, 1e9)),
    st.floats(1e-6, 1e6),
    st.floats(1e-6, 1e4),
)
@settings(max_examples=300, deadline=None)
def test_nothing_is_longer_than_the_bound(
    update: np.ndarray[Any, Any], bound: float, noise_multiplier: float
) -> None:
    integer_grid = grid(bound, noise_multiplier, update.size)
    steps = placed(update, integer_grid)
    assert steps.dtype == np.int64
    assert np.linalg.norm(steps.astype(np.float64)) <= integer_grid.sensitivity_steps


@pytest.mark.parametrize("size", [1, 3, 1000, 300_000])
def test_rounding_up_is_made_up_for(size: int) -> None:
    """Every coordinate just above the half of a step: the failing twin, rounded and no more, is far too long."""
    integer_grid = IntegerGrid(1.0, 4096.0, 1.0 / (0.501 * size**0.5))
    update = np.full(size, 1.0 / size**0.5)
    assert (
        np.linalg.norm(np.rint(update / integer_grid.step)) > 1.9 * integer_grid.sensitivity_steps
    )
    assert np.linalg.norm(placed(update, integer_grid)) <= integer_grid.sensitivity_steps


def test_what_is_within_the_bound_stays_and_what_is_longer_is_scaled_down() -> None:
    draw = np.random.default_rng(1)
    update = draw.standard_normal(5000)
    update *= 0.9 / np.linalg.norm(update)
    integer_grid = grid(1.0, 1.0, update.size)
    assert np.abs(
        placed(update, integer_grid) * integer_grid.step - update
    ).max() <= integer_grid.step / 2 * (1 + 1e-9)
    long = placed(7 * update, integer_grid) * integer_grid.step
    assert np.abs(long - update / 0.9).max() <= integer_grid.step
    assert np.linalg.norm(long) == pytest.approx(1.0, rel=1e-3)


def test_no_update_and_no_coordinates_are_no_error() -> None:
    integer_grid = grid(1.0, 1.0, 3)
    assert placed(np.zeros(3), integer_grid).tolist() == [0, 0, 0]
    assert placed(np.empty(0), grid(1.0, 1.0, 0)).tolist() == []


def test_only_what_is_learnt_is_in_it(counted: Arrays) -> None:
    assert floating(counted) == ["fc.weight", "fc.bias", "scale", "wide"]
    later = {k: np.asarray(a + 1, a.dtype) for k, a in counted.items()}
    change = difference(later, counted)
    assert change.dtype == np.float64
    assert change.shape == (12 + 3 + 1 + 2,)
    np.testing.assert_allclose(change, 1, atol=1e-6)


def test_moved_is_the_inverse_of_difference(counted: Arrays) -> None:
    draw = np.random.default_rng(2)
    later = {
        k: np.asarray(a + draw.standard_normal(a.shape), a.dtype) if a.dtype.kind == "f" else a
        for k, a in counted.items()
    }
    found = moved(counted, difference(later, counted))
    assert list(found) == list(counted)
    for name, a in later.items():
        np.testing.assert_allclose(found[name], a, rtol=1e-12, atol=1e-12)
        assert found[name].shape == a.shape
    # Counters are nobody's to move, as no noise covers them.
    stepped = {**later, "batches": np.asarray(99, np.int64)}
    assert moved(counted, difference(stepped, counted))["batches"] == 3


def test_the_order_of_the_updates_is_nothing() -> None:
    """The failing twin: sums of floats depend on it, and so would the model's last bits on the sites' names."""
    draw = np.random.default_rng(3)
    updates = [draw.standard_normal(200) for _ in range(30)]
    integer_grid = grid(1.0, 1.0, 200)
    forth = sum(placed(u, integer_grid) for u in updates)
    back = sum(placed(u, integer_grid) for u in reversed(updates))
    np.testing.assert_array_equal(forth, back)
    assert (sum(updates) != sum(reversed(updates))).any()
