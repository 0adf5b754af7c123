"""Preprocessing: one implementation for sites and devices, fitted from sums only."""

import json

import numpy as np
import pytest

from fedge.shared.errors import BundleError, DataError, InputError
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.steps import OneHot, Reshape, Scale, Standardise, Statistics
from fedge.shared.tasks.registry import get_task

STEPS = (
    OneHot(((1, (0.0, 1.0, 2.0)), (3, (5.0, 7.0)))),
    Scale(0.5),
    Standardise((1.0, 2.0, 0.25, 0.5, 0.5), (1.0, 3.0, 0.5, 0.25, 0.1)),
    Reshape((5, 1)),
)


def rows(n: int = 40) -> np.ndarray:
    draw = np.random.default_rng(3)
    return np.stack(
        [draw.normal(size=n), draw.integers(0, 3, n), draw.normal(5, 2, n), draw.choice([5, 7], n)],
        axis=1,
    ).astype(np.float32)


def test_steps_round_trip_through_text():
    text = json.dumps([step.to_json() for step in STEPS])
    assert preprocessing.from_json(json.loads(text)) == STEPS


def test_scale_keeps_the_type():
    x = np.array([[1.0, 2.0]], np.float32)
    made = Scale(1 / 16).apply(x)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, x / 16)


def test_one_hot_drops_the_first_category_and_appends_in_column_order():
    x = np.array([[9, 0, 4, 7], [8, 2, 3, 5], [7, 1, 2, 7]], np.float32)
    expected = [[9, 4, 0, 0, 1], [8, 3, 0, 1, 0], [7, 2, 1, 0, 1]]
    np.testing.assert_array_equal(STEPS[0].apply(x), np.array(expected, np.float32))


@pytest.mark.parametrize("value", [3.0, 0.5, -1.0, np.nan])
def test_one_hot_refuses_an_unknown_category(value: float):
    x = rows(4)
    x[2, 1] = value
    with pytest.raises(InputError, match="row 2, column 1") as refused:
        STEPS[0].apply(x)
    assert refused.value.code == 806


def test_standardise_gives_mean_zero_and_deviation_one():
    x = rows(200)[:, [0, 2]].astype(np.float64)
    step = preprocessing.statistics((Standardise(),), x).standardise()
    made = step.apply(x)
    np.testing.assert_allclose(made.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(made.std(axis=0, ddof=1), 1, rtol=1e-8)


def test_a_constant_column_becomes_zero_not_nan():
    x = np.full((5, 1), 3.0, np.float32)
    step = preprocessing.statistics((Standardise(),), x).standardise()
    np.testing.assert_array_equal(step.apply(x), np.zeros((5, 1), np.float32))


def test_one_row_has_no_deviation_but_a_mean():
    step = preprocessing.statistics((Standardise(),), np.array([[2.0, 4.0]])).standardise()
    assert step == Standardise((2.0, 4.0), (0.0, 0.0))


@pytest.mark.parametrize(
    "step", [Standardise(), Standardise((0.0,), (1.0,)), Standardise((0.0, 0.0), (1.0,))]
)
def test_standardise_refuses_what_it_was_not_fitted_to(step: Standardise):
    with pytest.raises(DataError) as refused:
        step.apply(np.zeros((3, 2), np.float32))
    assert refused.value.code == 302


def test_reshape_keeps_the_examples():
    x = np.arange(32, dtype=np.float32).reshape(2, 4, 4)
    assert Reshape((1, 4, 4)).apply(x).shape == (2, 1, 4, 4)
    np.testing.assert_array_equal(Reshape((16,)).apply(x)[1], x[1].ravel())


def test_apply_runs_the_steps_in_order():
    x = rows()
    by_hand = STEPS[3].apply(STEPS[2].apply(STEPS[1].apply(STEPS[0].apply(x))))
    made = preprocessing.apply(STEPS, x)
    np.testing.assert_array_equal(made, by_hand)
    assert made.shape == (40, 5, 1)
    assert not np.array_equal(
        made, preprocessing.apply((STEPS[0], STEPS[2], STEPS[1], STEPS[3]), x)
    )


def test_statistics_are_of_the_columns_that_reach_standardise():
    x = rows()
    steps = (STEPS[0], STEPS[1], Standardise(), Scale(100.0))
    found = preprocessing.statistics(steps, x)
    columns = (STEPS[0].apply(x) * 0.5).astype(np.float64)
    assert found.count == 40
    np.testing.assert_allclose(found.total, columns.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.total_of_squares, (columns**2).sum(axis=0), rtol=1e-12)


@pytest.mark.parametrize("cuts", [[100], [1, 2, 3], [57, 200, 201, 500]])
def test_statistics_pooled_over_sites_are_those_of_the_whole(cuts: list[int]):
    task = get_task("breast-cancer")
    x = task.load(None).features
    whole = preprocessing.statistics(task.preprocessing, x)
    parts = [preprocessing.statistics(task.preprocessing, part) for part in np.split(x, cuts)]
    together = preprocessing.pooled(parts)
    assert together.count == len(x)
    np.testing.assert_allclose(together.total, whole.total, rtol=1e-12)
    np.testing.assert_allclose(together.total_of_squares, whole.total_of_squares, rtol=1e-12)
    fitted, reference = together.standardise(), x.astype(np.float64)
    np.testing.assert_allclose(fitted.mean, whole.standardise().mean, rtol=1e-12)
    np.testing.assert_allclose(fitted.std, whole.standardise().std, rtol=1e-12)
    np.testing.assert_allclose(fitted.mean, reference.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(fitted.std, reference.std(axis=0, ddof=1), rtol=1e-9)


def test_pooled_counts_every_part_once():
    one = Statistics(2, (1.0, 2.0), (1.0, 4.0))
    assert preprocessing.pooled([one, one, one]) == Statistics(6, (3.0, 6.0), (3.0, 12.0))


def test_fitted_fills_only_the_step_that_learns():
    steps = (Scale(2.0), Standardise(), Reshape((2,)))
    made = preprocessing.fitted(steps, Standardise((1.0, 2.0), (3.0, 4.0)))
    assert made == (Scale(2.0), Standardise((1.0, 2.0), (3.0, 4.0)), Reshape((2,)))
    assert steps[1] == Standardise()
    assert preprocessing.learns(steps)
    assert not preprocessing.learns((Scale(2.0), Reshape((2,))))


@pytest.mark.parametrize(
    "values",
    [
        None,
        "scale",
        [None],
        ["scale"],
        [{}],
        [{"op": "exec"}],
        [{"op": "scale"}],
        [{"op": "scale", "factor": "much"}],
        [{"op": "scale", "factor": 10**400}],
        [{"op": "one-hot", "columns": [[1]]}],
        [{"op": "one-hot", "columns": 3}],
        [{"op": "standardise", "mean": [1.0]}],
        [{"op": "standardise", "mean": ["a"], "std": [1.0]}],
        [{"op": "reshape", "shape": None}],
        [{"op": "reshape", "shape": [float("inf")]}],
    ],
)
def test_what_is_no_step_is_refused(values):
    with pytest.raises(BundleError) as refused:
        preprocessing.from_json(values)
    assert refused.value.code == 706
