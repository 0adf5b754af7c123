from fedge.shared.preprocessing.steps import OneHot, Scale, Standardise
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.standardised_columns import column_bounds
from fedge.shared.tasks.task import Task

TASK = get_task("breast-cancer")


def test_column_bounds_follow_the_columns_that_reach_standardise():
    bounds = [(f.name, f.low, f.high) for f in TASK.input.features]
    assert column_bounds(TASK) == tuple(bounds)
    hot = (OneHot(((0, (0.0, 1.0, 2.0)), (2, (3.0, 4.0)))), Standardise())
    encoded = Task(**{**vars(TASK), "preprocessing": hot})
    first, third = bounds[0][0], bounds[2][0]
    indicators = [(f"{first} 1", 0.0, 1.0), (f"{first} 2", 0.0, 1.0), (f"{third} 4", 0.0, 1.0)]
    expected = [bounds[1], *bounds[3:], *indicators]
    assert column_bounds(encoded) == tuple(expected)
    assert column_bounds(Task(**{**vars(TASK), "preprocessing": (Scale(2.0),)})) == ()
