"""Examples from a file: bounded, checked against the model's schema, and handed on in chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.shared.bounded import read_bounded, reason
from fedge.shared.errors import InputError
from fedge.shared.preprocess import OneHot, Standardise, Step
from fedge.shared.schema import InputSchema

Array: TypeAlias = NDArray[Any]

#: The most that one call reads.
MAX_ROWS: Final = 10_000_000
MAX_BYTES: Final = 8 * 2**30
#: Rows handed on together, fewer where one row is large.
CHUNK_ROWS: Final = 1024
CHUNK_VALUES: Final = 2**22
_STATISTICS_LIMIT: Final = 2**20
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RowRules:
    """What every row must meet.

    Attributes:
        schema: of the raw example.
        categories: allowed values by flat column index.
    """

    schema: InputSchema
    categories: dict[int, tuple[float, ...]]

    @classmethod
    def of(cls, schema: InputSchema, steps: Sequence[Step]) -> RowRules:
        """From the schema's features, and from a one-hot step that takes the raw columns."""
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
        """Rows to hand on together."""
        return max(1, min(CHUNK_ROWS, CHUNK_VALUES // self.values))

    def column(self, index: int) -> str:
        """A column as messages name it."""
        features = self.schema.features
        return f"column {features[index].name!r}" if features else f"column {index}"

    def checked(self, flat: Array, first_row: int) -> Array:
        """Numbers ``(n, values)`` of any real type as float32 examples ``(n, *shape)``.

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
        """Names of the columns, row by row, whose value lies outside its feature's low to high.

        Args:
            examples: as ``checked`` gives them, ``(n, *shape)``.
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


def read_examples(source: str, rules: RowRules) -> Iterator[Array]:
    """Examples of a file in chunks ``(n, *shape)`` of float32.

    Args:
        source: path of a .npy or .csv file, or ``-`` for CSV on standard input.
        rules: what the rows must meet.

    Raises:
        InputError: 801 to 806; also while iterating.
    """
    from fedge.edge import csv_input, npy_input

    if source == "-":
        return csv_input.from_stdin(rules)
    path = Path(source)
    match path.suffix.lower():
        case ".npy":
            return npy_input.from_file(path, rules)
        case ".csv":
            return csv_input.from_file(path, rules)
        case suffix:
            raise InputError(
                801, f"{path.name}: must end in .npy or .csv, got {suffix or 'no ending'!r}"
            )


def read_statistics(path: Path) -> Standardise:
    """A site's own mean and standard deviation, ``{"mean": [...], "std": [...]}``.

    Raises:
        InputError: 807, the file cannot be read or holds something else.
    """
    try:
        value = json.loads(read_bounded(path, _STATISTICS_LIMIT))
        mean, std = ([_number(x) for x in value[key]] for key in ("mean", "std"))
    except OSError as error:
        raise InputError(807, f"{path}: cannot be read ({reason(error)})") from None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise InputError(
            807, f'{path}: must be {{"mean": [numbers], "std": [numbers]}}, got something else'
        ) from None
    if not mean or len(mean) != len(std):
        raise InputError(
            807, f"{path}: must hold as many std as mean, got {len(std)} and {len(mean)}"
        )
    if any(s < 0 for s in std):
        raise InputError(807, f"{path}: std must not be negative")
    return Standardise(tuple(mean), tuple(std))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be a finite number")
    return float(value)
