"""Examples from a file: bounded, validated against the model's schema, and read in chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fedge.edge.inputs.row_rules import Array, RowRules
from fedge.shared.errors import InputError
from fedge.shared.files import read_bounded, reason
from fedge.shared.preprocessing.steps import Standardise

_STATISTICS_LIMIT: Final = 2**20


def read_examples(source: str, rules: RowRules) -> Iterator[Array]:
    """Read the examples of a file in chunks ``(n, *shape)`` of float32.

    Args:
        source: path of a .npy or .csv file, or ``-`` for CSV on standard input.
        rules: that the rows must meet.

    Raises:
        InputError: 801 to 806; also while iterating.
    """
    from fedge.edge.inputs import csv_rows, npy_rows

    if source == "-":
        return csv_rows.from_stdin(rules)
    path = Path(source)
    match path.suffix.lower():
        case ".npy":
            return npy_rows.from_file(path, rules)
        case ".csv":
            return csv_rows.from_file(path, rules)
        case suffix:
            raise InputError(
                801, f"{path.name}: must end in .npy or .csv, got {suffix or 'no ending'!r}"
            )


def read_statistics(path: Path) -> Standardise:
    """Read a site's own mean and standard deviation, ``{"mean": [...], "std": [...]}``.

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
