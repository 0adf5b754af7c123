"""Preprocessing as declared steps, in numpy, one implementation for training and for the edge.

A task declares steps; a run fits the one step that depends on data (``Standardise``); the bundle's manifest
carries the fitted steps; the edge applies them. Shapes: ``x`` is ``(n, *shape)``, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.shared.errors import BundleError, DataError, InputError

Array: TypeAlias = NDArray[Any]

#: Added to the standard deviation, so that a constant column is not divided by zero (as in FLamby).
STD_FLOOR = 1e-9


@dataclass(frozen=True)
class Scale:
    """Multiply by a constant, for example 1/16 for the digits' grey levels."""

    factor: float

    def apply(self, x: Array) -> Array:
        """``(n, *shape)`` to the same shape."""
        return np.asarray(x * np.asarray(self.factor, dtype=x.dtype))

    def to_json(self) -> dict[str, Any]:
        """The step as plain JSON values."""
        return {"op": "scale", "factor": self.factor}


@dataclass(frozen=True)
class OneHot:
    """Replace columns by indicator columns of their declared categories, appended on the right in column order.

    The first category is dropped, as it is implied by the others being zero.

    Attributes:
        columns: (index, categories) pairs, indices of the raw columns, ascending.
    """

    columns: tuple[tuple[int, tuple[float, ...]], ...]

    def apply(self, x: Array) -> Array:
        """``(n, c)`` to ``(n, c - len(columns) + sum(len(categories) - 1))``.

        Raises:
            InputError: 806, a value is not among its column's categories.
        """
        encoded = []
        for index, categories in self.columns:
            column = x[:, index]
            valid = np.isin(column, np.asarray(categories, dtype=x.dtype))
            if not valid.all():
                row = int(np.flatnonzero(~valid)[0])
                raise InputError(
                    806,
                    f"row {row}, column {index}: must be one of {list(categories)}, got {float(column[row])!r}",
                )
            encoded += [
                (column == x.dtype.type(c)).astype(x.dtype)[:, None] for c in categories[1:]
            ]
        numeric = np.delete(x, [index for index, _ in self.columns], axis=1)
        return np.concatenate([numeric, *encoded], axis=1)

    def to_json(self) -> dict[str, Any]:
        """The step as plain JSON values."""
        return {
            "op": "one-hot",
            "columns": [[index, list(categories)] for index, categories in self.columns],
        }


@dataclass(frozen=True)
class Standardise:
    """Subtract a mean and divide by a standard deviation, column by column.

    A task declares it empty; ``fitted`` sets mean and standard deviation.

    Attributes:
        mean: of each column, ``(c,)``.
        std: standard deviation of each column, ``(c,)``.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def apply(self, x: Array) -> Array:
        """``(n, c)`` to ``(n, c)``.

        Raises:
            DataError: 302, the step is not fitted, or fitted for another number of columns.
        """
        if len(self.mean) != x.shape[1] or len(self.std) != x.shape[1]:
            raise DataError(
                302, f"standardise: must hold {x.shape[1]} columns, got {len(self.mean)}"
            )
        mean, std = np.asarray(self.mean, dtype=np.float64), np.asarray(self.std, dtype=np.float64)
        return np.asarray(((x.astype(np.float64) - mean) / (std + STD_FLOOR)).astype(x.dtype))

    def to_json(self) -> dict[str, Any]:
        """The step as plain JSON values."""
        return {"op": "standardise", "mean": list(self.mean), "std": list(self.std)}


@dataclass(frozen=True)
class Reshape:
    """Give every example another shape, for example a channel axis."""

    shape: tuple[int, ...]

    def apply(self, x: Array) -> Array:
        """``(n, *old)`` to ``(n, *shape)``."""
        return np.reshape(x, (x.shape[0], *self.shape))

    def to_json(self) -> dict[str, Any]:
        """The step as plain JSON values."""
        return {"op": "reshape", "shape": list(self.shape)}


Step: TypeAlias = Scale | OneHot | Standardise | Reshape


@dataclass(frozen=True)
class Statistics:
    """Sums over a site's training rows; nothing else of its features is reported.

    Attributes:
        count: number of rows.
        total: sum of each column, ``(c,)``.
        total_of_squares: sum of each column's squares, ``(c,)``.
    """

    count: int
    total: tuple[float, ...]
    total_of_squares: tuple[float, ...]

    def standardise(self) -> Standardise:
        """The step with this mean and standard deviation (ddof 1)."""
        mean = np.asarray(self.total) / self.count
        centred = np.maximum(np.asarray(self.total_of_squares) - self.count * mean**2, 0.0)
        std = np.sqrt(centred / max(self.count - 1, 1))
        return Standardise(mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def apply(steps: Sequence[Step], x: Array) -> Array:
    """Apply all steps in order to ``x``, ``(n, *shape)``."""
    for step in steps:
        x = step.apply(x)
    return x


def learns(steps: Sequence[Step]) -> bool:
    """Whether a step must be fitted to data."""
    return any(isinstance(step, Standardise) for step in steps)


def statistics(steps: Sequence[Step], x: Array) -> Statistics:
    """Sums over the columns that ``Standardise`` gets.

    Args:
        steps: of the task.
        x: raw examples, ``(n, *shape)``.
    """
    before: list[Step] = []
    for step in steps:
        if isinstance(step, Standardise):
            break
        before.append(step)
    columns = apply(before, x).astype(np.float64)
    return Statistics(
        count=int(columns.shape[0]),
        total=tuple(columns.sum(axis=0).tolist()),
        total_of_squares=tuple((columns**2).sum(axis=0).tolist()),
    )


def pooled(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of all parts together, added in the given order."""
    return Statistics(
        count=sum(p.count for p in parts),
        total=_column_sums([p.total for p in parts]),
        total_of_squares=_column_sums([p.total_of_squares for p in parts]),
    )


def _column_sums(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    total = np.zeros(len(rows[0]), dtype=np.float64)
    for row in rows:
        total += np.asarray(row, dtype=np.float64)
    return tuple(total.tolist())


def fitted(steps: Sequence[Step], standardise: Standardise) -> tuple[Step, ...]:
    """The steps, with ``standardise`` in place of the unfitted ``Standardise``."""
    return tuple(
        replace(step, mean=standardise.mean, std=standardise.std)
        if isinstance(step, Standardise)
        else step
        for step in steps
    )


def from_json(values: Any) -> tuple[Step, ...]:
    """Parse the steps of a manifest.

    Raises:
        BundleError: 706, a step is unknown or does not parse.
    """
    if not isinstance(values, list):
        raise BundleError(
            706, f"manifest: the preprocessing must be a list, got {type(values).__name__}"
        )
    steps: list[Step] = []
    try:
        for value in values:
            match value["op"]:
                case "scale":
                    steps.append(Scale(float(value["factor"])))
                case "one-hot":
                    steps.append(
                        OneHot(
                            tuple(
                                (int(i), tuple(float(c) for c in cs)) for i, cs in value["columns"]
                            )
                        )
                    )
                case "standardise":
                    mean, std = value["mean"], value["std"]
                    steps.append(
                        Standardise(tuple(float(m) for m in mean), tuple(float(s) for s in std))
                    )
                case "reshape":
                    steps.append(Reshape(tuple(int(n) for n in value["shape"])))
                case op:
                    raise BundleError(706, f"manifest: preprocessing step {op!r} is not known here")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BundleError(706, f"manifest: the preprocessing does not parse ({error!r})") from None
    return tuple(steps)
