"""Validation of input rows: number of values, finite, within float32; and limits on their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.shared.errors import InputError
from fedge.shared.preprocessing.schema import InputSchema
from fedge.shared.preprocessing.steps import OneHot, Step

Array: TypeAlias = NDArray[Any]


#: Limits of one call.
MAX_ROWS: Final = 10_000_000


MAX_BYTES: Final = 8 * 2**30


#: Rows in one chunk, fewer where one row is large.
CHUNK_ROWS: Final = 1024


CHUNK_VALUES: Final = 2**22
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RowRules:
    """Rules that every input row must meet.

    Attributes:
        schema: of one raw example.
        categories: allowed values by flat column index.
    """

    schema: InputSchema
    categories: dict[int, tuple[float, ...]]

    @classmethod
    def from_schema(cls, schema: InputSchema, steps: Sequence[Step]) -> RowRules:
        """Rules from the schema's features, and from a one-hot step on the raw columns."""
        categories = {i: f.categories for i, f in enumerate(schema.features) if f.categories}
        if steps and isinstance(steps[0], OneHot):
            categories.update(dict(steps[0].columns))
        return cls(schema, categories)

    @property
    def values(self) -> int:
        """Numbers in one example."""
        return math.prod(self.schema.shape)

    @property
    def chunk(self) -> int:
        """Rows in one chunk."""
        return max(1, min(CHUNK_ROWS, CHUNK_VALUES // self.values))

    def column(self, index: int) -> str:
        """Name of a column in messages."""
        features = self.schema.features
        return f"column {features[index].name!r}" if features else f"column {index}"

    def checked(self, flat: Array, first_row: int) -> Array:
        """Validate numbers ``(n, values)`` of any real type; returns float32 examples ``(n, *shape)``.

        Args:
            flat: numbers of the rows.
            first_row: number of the first row, for messages.

        Raises:
            InputError: 803, a number does not fit float32; 804, NaN or infinity; 806, an unknown
                category. The message names row and column.
        """
        converted = self._float32(flat, first_row)
        for index, categories in self.categories.items():
            column = converted[:, index]
            unknown = ~np.isin(column, np.asarray(categories, dtype=np.float32))
            if unknown.any():
                row = int(np.flatnonzero(unknown)[0])
                allowed = ", ".join(f"{c:g}" for c in categories[:20])
                where = f"row {first_row + row}, {self.column(index)}"
                raise InputError(
                    806, f"{where}: must be one of {allowed}, got {float(column[row]):g}"
                )
        return converted.reshape(len(flat), *self.schema.shape)

    def outside(self, examples: Array) -> list[tuple[str, ...]]:
        """For each row, the names of the columns whose value is outside the feature's range.

        Args:
            examples: ``(n, *shape)`` of float32, from ``checked``.
        """
        features = self.schema.features
        if not features:
            return [()] * len(examples)
        # As float32, as the values are: a value that equals its bound in the file is within it.
        with np.errstate(over="ignore"):
            low = np.asarray([f.low for f in features]).astype(np.float32)
            high = np.asarray([f.high for f in features]).astype(np.float32)
        beyond = (examples < low) | (examples > high)
        names: list[tuple[str, ...]] = [()] * len(examples)
        for row in np.flatnonzero(beyond.any(axis=1)).tolist():
            names[row] = tuple(features[i].name for i in np.flatnonzero(beyond[row]).tolist())
        return names

    def _float32(self, flat: Array, first_row: int) -> Array:
        if flat.dtype.kind == "f":
            self._refuse(~np.isfinite(flat), flat, first_row, 804, "must be finite")
            if flat.dtype.itemsize > 4:
                self._refuse(np.abs(flat) > _FLOAT32_MAX, flat, first_row, 803, "must fit float32")
            return flat.astype(np.float32)
        with np.errstate(over="ignore"):
            converted = flat.astype(np.float32)
        # Compared as whole numbers of any size: float64 could round both alike.
        beyond = (flat > 2**24) | (flat < -(2**24))
        if flat.dtype.itemsize > 2 and beyond.any():
            rows, columns = np.nonzero(beyond)
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                if int(flat[row, column]) != int(converted[row, column]):
                    inexact = np.zeros(flat.shape, dtype=bool)
                    inexact[row, column] = True
                    self._refuse(inexact, flat, first_row, 803, "must fit float32 exactly")
        return converted

    def _refuse(self, bad: Array, flat: Array, first_row: int, code: int, rule: str) -> None:
        if bad.any():
            row, column = (int(index) for index in np.argwhere(bad)[0])
            where = f"row {first_row + row}, {self.column(column)}"
            raise InputError(code, f"{where}: {rule}, got {flat[row, column].item()!r}")
