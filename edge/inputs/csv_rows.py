"""Examples from CSV, row by row: under a header of feature names, or columns in the model's order."""

from __future__ import annotations

import csv
import difflib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from fedge.edge.inputs.row_rules import MAX_BYTES, MAX_ROWS, Array, RowRules
from fedge.shared.errors import InputError
from fedge.shared.files import open_regular, reason

_MAX_LINE: Final = 2**30


def from_file(path: Path, rules: RowRules) -> Iterator[Array]:
    """Read a CSV file in chunks ``(n, *shape)`` of float32.

    Args:
        path: of the file.
        rules: that the rows must meet.

    Raises:
        InputError: 801 to 806; also while iterating.
    """
    try:
        file, size = open_regular(path)
    except OSError as error:
        raise InputError(801, f"{path}: cannot be read ({reason(error)})") from None
    with io.BufferedReader(file) as buffered:  # type: ignore[type-var]
        if size > MAX_BYTES:
            raise InputError(805, f"{path.name}: must be at most {MAX_BYTES} bytes, got {size}")
        yield from _chunks(buffered, path.name, rules)


def from_stdin(rules: RowRules) -> Iterator[Array]:
    """Read CSV on standard input, as ``from_file`` does."""
    return _chunks(sys.stdin.buffer, "standard input", rules)


def _chunks(file: BinaryIO, name: str, rules: RowRules) -> Iterator[Array]:
    order: list[int] | None = None
    held: list[list[float]] = []
    row = 0
    for number, cells in _lines(file, name, rules):
        if order is None:
            order = _header(cells, name, rules)
            if order:
                continue
        if row >= MAX_ROWS:
            raise InputError(805, f"{name}: must hold at most {MAX_ROWS} rows")
        held.append(_numbers(cells, f"{name} line {number}", rules, order or []))
        row += 1
        if len(held) == rules.chunk:
            yield rules.checked(np.asarray(held, dtype=np.float64), row - len(held))
            held = []
    if not row:
        raise InputError(802, f"{name}: must hold a row, got none")
    if held:
        yield rules.checked(np.asarray(held, dtype=np.float64), row - len(held))


def _lines(file: BinaryIO, name: str, rules: RowRules) -> Iterator[tuple[int, list[str]]]:
    """Cells of each line that is not blank, with the line's number from 1."""
    limit = min(64 * rules.values + 65_536, _MAX_LINE)
    total = 0
    number = 0
    while True:
        try:
            line = file.readline(limit + 1)
        except OSError as error:
            raise InputError(801, f"{name}: cannot be read ({reason(error)})") from None
        if not line:
            return
        number += 1
        total += len(line)
        if len(line) > limit or total > MAX_BYTES:
            raise InputError(
                805, f"{name} line {number}: must be at most {limit} bytes, {MAX_BYTES} in all"
            )
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            rows = list(csv.reader([text], strict=True))
        except UnicodeDecodeError:
            raise InputError(801, f"{name} line {number}: must be UTF-8 text") from None
        except (csv.Error, ValueError):
            raise InputError(
                802, f"{name} line {number}: must be cells with commas between them"
            ) from None
        # More than one row: a carriage return within the line.
        if len(rows) != 1 and text.strip():
            raise InputError(802, f"{name} line {number}: must end as other lines do")
        if text.strip():
            yield number, [cell.strip() for cell in rows[0]]


def _header(cells: list[str], name: str, rules: RowRules) -> list[int]:
    """Position of each feature in the lines, or nothing where the first line holds numbers."""
    feature_names = [feature.name for feature in rules.schema.features]
    present = set(cells) & set(feature_names)
    if not present and any(_is_number(cell) for cell in cells):
        return []
    if not feature_names:
        raise InputError(
            802, f"{name} line 1: must be numbers, as this model's columns have no names"
        )
    for cell in cells:
        if cell not in feature_names:
            near = difflib.get_close_matches(cell[:64], feature_names, n=1)
            hint = (
                f"the nearest is {near[0]!r}" if near else f"known are {', '.join(feature_names)}"
            )
            raise InputError(802, f"{name} line 1: unknown column {cell[:64]!r}; {hint}")
        if cells.count(cell) > 1:
            raise InputError(802, f"{name} line 1: column {cell!r} must stand once")
    missing = [feature for feature in feature_names if feature not in present]
    if missing:
        raise InputError(802, f"{name} line 1: missing column {', '.join(map(repr, missing))}")
    return [cells.index(feature) for feature in feature_names]


def _numbers(cells: list[str], where: str, rules: RowRules, order: list[int]) -> list[float]:
    if len(cells) != rules.values:
        raise InputError(802, f"{where}: must hold {rules.values} cells, got {len(cells)}")
    try:
        # float() accepts 1_000, which no other CSV parser does.
        if not any("_" in cell for cell in cells):
            return (
                [float(cells[index]) for index in order]
                if order
                else [float(cell) for cell in cells]
            )
    except ValueError:
        pass
    at = order or range(len(cells))
    column, cell = next((c, cells[i]) for c, i in enumerate(at) if not _is_number(cells[i]))
    raise InputError(803, f"{where}, {rules.column(column)}: must be a number, got {cell[:32]!r}")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell
