"""Examples from a .npy file: the header is bounded and matched, never evaluated; no pickle."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from fedge.edge.inputs.row_rules import MAX_BYTES, MAX_ROWS, Array, RowRules
from fedge.shared.errors import InputError
from fedge.shared.files import open_regular, read_exactly, reason

_MAGIC: Final = b"\x93NUMPY"
_MAX_HEADER: Final = 10_000
#: Columns first in memory: the whole array must be held to walk it by rows.
_MAX_FORTRAN_BYTES: Final = 2**30
_HEADER = re.compile(
    r"\{'descr': '([<>|=]?[A-Za-z]\d{0,4})', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,15}, ?)*\d{0,15},?)\), ?\}\s*"
)
_TYPE = re.compile(r"[<>|=]?(?:f[248]|[iu][1248])")


def from_file(path: Path, rules: RowRules) -> Iterator[Array]:
    """Read a .npy file in chunks ``(n, *shape)`` of float32.

    The array may hold examples, flat examples, or one example.

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
    with file:
        dtype, fortran, shape, start = _header(file, path.name)
        rows = _rows(shape, rules, path.name)
        expected = start + dtype.itemsize * math.prod(shape)
        if rows > MAX_ROWS or expected > MAX_BYTES:
            raise InputError(
                805, f"{path.name}: must hold at most {MAX_ROWS} rows and {MAX_BYTES} bytes"
            )
        if size != expected:
            raise InputError(
                801, f"{path.name}: must be {expected} bytes as its header says, got {size}"
            )
        if fortran and len(shape) > 1:
            if expected > _MAX_FORTRAN_BYTES:
                raise InputError(805, f"{path.name}: must be in C order at this size")
            array = _read(file, dtype, math.prod(shape), path.name)
            flat = np.reshape(np.reshape(array, shape, order="F"), (rows, rules.values))
            for first in range(0, rows, rules.chunk):
                yield rules.checked(flat[first : first + rules.chunk], first)
            return
        for first in range(0, rows, rules.chunk):
            count = min(rules.chunk, rows - first)
            values = _read(file, dtype, count * rules.values, path.name)
            yield rules.checked(values.reshape(count, rules.values), first)


def _header(file: BinaryIO, name: str) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    """Type, order, shape, and the offset of the data."""
    start = read_exactly(file, 8)
    if len(start) < 8 or start[:6] != _MAGIC or start[6] not in (1, 2, 3):
        raise InputError(801, f"{name}: must be a .npy file of version 1 to 3, got other bytes")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(read_exactly(file, width), "little")
    if length > _MAX_HEADER:
        raise InputError(805, f"{name}: header must be at most {_MAX_HEADER} bytes, got {length}")
    text = read_exactly(file, length)
    match = _HEADER.fullmatch(text.decode("latin-1"))
    if match is None or len(text) != length:
        raise InputError(803, f"{name}: must hold one plain array of numbers")
    if _TYPE.fullmatch(match[1]) is None:
        raise InputError(
            803, f"{name}: must be float32, or float or int that fits it, got {match[1]!r}"
        )
    shape = tuple(int(n) for n in match[3].replace(" ", "").split(",") if n)
    return np.dtype(match[1]), match[2] == "True", shape, 8 + width + length


def _rows(shape: tuple[int, ...], rules: RowRules, name: str) -> int:
    """How many examples an array of this shape holds."""
    one = rules.schema.shape
    if shape in (one, (rules.values,)):
        return 1
    if shape[1:] not in (one, (rules.values,)) or len(shape) < 2:
        text = ", ".join(map(str, one))
        flat = "" if len(one) == 1 else f" or (n, {rules.values})"
        raise InputError(802, f"{name}: must have shape (n, {text}){flat}, got {_text(shape)}")
    if shape[0] == 0:
        raise InputError(802, f"{name}: must hold a row, got none")
    return shape[0]


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape[:8]))}{', …' if len(shape) > 8 else ''})"


def _read(file: BinaryIO, dtype: np.dtype[Any], count: int, name: str) -> Array:
    try:
        data = read_exactly(file, count * dtype.itemsize)
    except OSError as error:
        raise InputError(801, f"{name}: cannot be read ({reason(error)})") from None
    if len(data) != count * dtype.itemsize:
        raise InputError(801, f"{name}: ended while it was read")
    return np.frombuffer(data, dtype=dtype)
