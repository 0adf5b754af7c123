"""A site's examples as files: four arrays in NumPy's format, without pickles."""

from __future__ import annotations

import math
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedge.client.data.dataset import SiteData
from fedge.shared.errors import DataError
from fedge.shared.files import open_regular, read_exactly, reason, write_atomically

_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "features": np.dtype(np.float32),
    "labels": np.dtype(np.int64),
}
_MAX_HEADER: Final = 4096
_MAX_DIMENSIONS: Final = 8


def write(folder: Path, data: SiteData) -> None:
    """Write a site's examples, replacing existing files.

    Args:
        folder: created if missing, readable by its owner only.
        data: the site's examples.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for part in fields(SiteData):
        buffer = BytesIO()
        array = np.ascontiguousarray(getattr(data, part.name))
        npy.write_array(buffer, array, version=(1, 0), allow_pickle=False)
        path = folder / _name(part.name)
        write_atomically(path, buffer.getvalue())
        path.chmod(0o600)


def read(folder: Path) -> SiteData:
    """Read a site's examples.

    Raises:
        DataError: 301, a file is missing; 302, a file is not the expected array.
    """
    arrays = {part.name: _read(folder / _name(part.name)) for part in fields(SiteData)}
    for split in ("train", "test"):
        features, labels = arrays[f"{split}_features"], arrays[f"{split}_labels"]
        if labels.ndim != 1 or features.ndim < 1 or len(features) != len(labels):
            raise DataError(
                302,
                f"{folder}: {split}: must hold one label a row, got features of shape"
                f" {features.shape} and labels of {labels.shape}",
            )
    if arrays["train_features"].shape[1:] != arrays["test_features"].shape[1:]:
        raise DataError(302, f"{folder}: must hold rows of one shape, got two")
    return SiteData(**arrays)


def _name(part: str) -> str:
    return f"{part.replace('_', '-')}.npy"


def _read(path: Path) -> NDArray[Any]:
    """The array of a file; its header must agree with the file's size before anything is allocated."""
    expected = _TYPES[path.stem.rpartition("-")[2]]
    try:
        file, size = open_regular(path)
    except FileNotFoundError:
        raise DataError(301, f"{path}: must be there, got nothing") from None
    except OSError as error:
        raise DataError(301, f"{path}: must be readable, got {reason(error)}") from None
    with file:
        head = BytesIO(read_exactly(file, min(size, _MAX_HEADER)))
        try:
            if npy.read_magic(head) != (1, 0):
                raise ValueError
            shape, fortran, dtype = npy.read_array_header_1_0(head, max_header_size=_MAX_HEADER)
        except Exception:
            # The parser of numpy raises many types on damaged bytes; all mean the same here.
            raise DataError(302, f"{path}: must be a .npy file, got other bytes") from None
        if (
            dtype != expected
            or fortran
            or len(shape) > _MAX_DIMENSIONS
            or min(shape, default=0) < 0
        ):
            raise DataError(302, f"{path}: must hold {expected} row by row, got {dtype} {shape}")
        count = math.prod(shape)
        if size != head.tell() + count * expected.itemsize:
            raise DataError(302, f"{path}: must hold {count} values of shape {shape}, got others")
        file.seek(head.tell())
        data = read_exactly(file, count * expected.itemsize)
    if len(data) != count * expected.itemsize:
        raise DataError(302, f"{path}: must stay as it is while it is read, got fewer bytes")
    array: NDArray[Any] = np.frombuffer(data, dtype=expected).reshape(shape)
    return array
