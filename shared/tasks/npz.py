"""Arrays from an .npz file: every member is matched and bounded before it is read; no pickle."""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedge.shared.errors import DataError
from fedge.shared.files import open_regular, reason

MAX_FILE_BYTES: Final = 1 << 30
_MAGIC: Final = b"\x93NUMPY\x01\x00"
_MAX_HEADER: Final = 1000
_HEADER: Final = re.compile(
    r"\{'descr': '([<|][a-z]\d)', 'fortran_order': False, "
    r"'shape': \(((?:\d{1,12}, ?)*\d{0,12},?)\), ?\}\s*"
)
_BROKEN: Final = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class ArraySpec(NamedTuple):
    """Type and shape that a member must have.

    Attributes:
        types: numpy's codes of the types it may have, such as ``"u1"``.
        shape: of one row, without the first axis.
    """

    types: tuple[str, ...]
    shape: tuple[int, ...] = ()


def read_npz(
    path: Path, members: Mapping[str, ArraySpec], *, max_rows: int
) -> dict[str, NDArray[Any]]:
    """Read arrays that have one row for each example; other members are not read.

    Args:
        path: of the file.
        members: expected type and shape by name.
        max_rows: maximum number of rows of each.

    Returns:
        Arrays ``(n, *shape)`` with the same n, 1 or more, read-only, in the byte order of the file.

    Raises:
        DataError: 301, the file cannot be read; 302, it or a member is not as expected.
    """
    try:
        stream, size = open_regular(path)
    except OSError as error:
        raise DataError(301, f"{path}: must be a readable file, got {reason(error)}") from None
    with stream:
        if size > MAX_FILE_BYTES:
            raise DataError(302, f"{path.name}: must be at most {MAX_FILE_BYTES} bytes, got {size}")
        try:
            with zipfile.ZipFile(stream) as archive:
                arrays = {
                    name: _member(archive, path.name, name, spec, max_rows)
                    for name, spec in members.items()
                }
        except _BROKEN as error:
            raise DataError(
                302, f"{path.name}: must be an .npz file, got {type(error).__name__}"
            ) from None
        except OSError as error:
            raise DataError(301, f"{path}: must be a readable file, got {reason(error)}") from None
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) != 1:
        raise DataError(302, f"{path.name}: arrays must have as many rows each, got {counts}")
    return arrays


def _member(
    archive: zipfile.ZipFile, file: str, name: str, spec: ArraySpec, max_rows: int
) -> NDArray[Any]:
    where = f"{file}, array {name}"
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise DataError(302, f"{where}: must be there, got none") from None
    with archive.open(info) as stream:
        start = stream.read(len(_MAGIC) + 2)
        length = int.from_bytes(start[-2:], "little")
        if start[:-2] != _MAGIC or length > _MAX_HEADER:
            raise DataError(302, f"{where}: must be in .npy format 1.0, got other bytes")
        match = _HEADER.fullmatch(stream.read(length).decode("latin-1"))
        if match is None:
            raise DataError(302, f"{where}: must be one plain array in C order, got another")
        shape = tuple(int(n) for n in match[2].replace(" ", "").split(",") if n)
        if match[1][1:] not in spec.types or shape[1:] != spec.shape or not shape:
            rows = ", ".join(map(str, ("n", *spec.shape)))
            raise DataError(
                302,
                f"{where}: must be {' or '.join(spec.types)} of shape ({rows}),"
                f" got {match[1][1:]} of shape {shape}",
            )
        if not 1 <= shape[0] <= max_rows:
            raise DataError(302, f"{where}: must have 1 to {max_rows} rows, got {shape[0]}")
        expected = np.dtype(match[1]).itemsize * math.prod(shape)
        # One byte more than is due, so that a longer member is detected; never more than that.
        data = stream.read(expected + 1)
    if len(data) != expected:
        got = "more" if len(data) > expected else str(len(data))
        raise DataError(302, f"{where}: must hold {expected} bytes, got {got}")
    return np.frombuffer(data, dtype=match[1]).reshape(shape)
