"""The columns that a task standardises, and within what the mean of each must lie."""

from __future__ import annotations

from typing import NamedTuple

from fedge.shared.preprocessing import steps
from fedge.shared.preprocessing.steps import OneHot, Standardise
from fedge.shared.tasks.task import Task


class Bound(NamedTuple):
    """Within what the mean of a standardised column must lie."""

    name: str
    low: float
    high: float

    @property
    def unit(self) -> float:
        """The column's magnitude, by which its sums are divided before they are added in fixed point."""
        return max(abs(self.low), abs(self.high)) or 1.0


def column_bounds(task: Task) -> tuple[Bound, ...]:
    """For each column that reaches ``Standardise``, within what its mean must lie; empty where there is none."""
    if not steps.learns(task.preprocessing):
        return ()
    bounds = [Bound(f.name, f.low, f.high) for f in task.input.features]
    for step in task.preprocessing:
        match step:
            case OneHot(columns):
                kept = [b for i, b in enumerate(bounds) if i not in {index for index, _ in columns}]
                bounds = kept + [
                    Bound(f"{bounds[index].name} {category:g}", 0.0, 1.0)
                    for index, categories in columns
                    for category in categories[1:]
                ]
            case Standardise():
                break
            case _:
                pass
    return tuple(bounds)
