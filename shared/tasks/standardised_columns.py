"""The columns that a task standardises, and the bounds of each column's mean."""

from __future__ import annotations

from typing import NamedTuple

from fedge.shared.preprocessing import steps
from fedge.shared.preprocessing.steps import OneHot, Standardise
from fedge.shared.tasks.task import Task


class Bound(NamedTuple):
    """Bounds of the mean of a standardised column.

    Attributes:
        name: of the column; for an indicator column with its category.
        low: smallest plausible mean.
        high: largest plausible mean.
    """

    name: str
    low: float
    high: float

    @property
    def unit(self) -> float:
        """The column's magnitude, by which its sums are divided before they are added in fixed point."""
        return max(abs(self.low), abs(self.high)) or 1.0


def column_bounds(task: Task) -> tuple[Bound, ...]:
    """The bounds of each column that ``Standardise`` gets; empty where the task does not standardise."""
    if not steps.learns(task.preprocessing):
        return ()
    bounds = [Bound(f.name, f.low, f.high) for f in task.input.features]
    for step in task.preprocessing:
        match step:
            case OneHot(columns):
                uncategorical = [
                    b for i, b in enumerate(bounds) if i not in {index for index, _ in columns}
                ]
                bounds = uncategorical + [
                    Bound(f"{bounds[index].name} {category:g}", 0.0, 1.0)
                    for index, categories in columns
                    for category in categories[1:]
                ]
            case Standardise():
                break
            case _:
                pass
    return tuple(bounds)
