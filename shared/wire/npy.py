"""Decodes tensors from untrusted input.

Flower's ``Array.numpy`` reads whatever shape the bytes claim, so a header of 10**12 elements allocates before it
fails. Here the NPY header (numpy.lib.format, versions 1 and 2) must state the expected shape and type, and the
length must match, before anything is allocated.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.lib import format as npy
from numpy.typing import NDArray

#: Largest header in bytes; a plain array needs less.
_MAX_HEADER = 4096


class UndecodableError(ValueError):
    """The bytes are not the expected tensor; the message says why."""


def decode(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Decode a tensor of exactly this shape and type.

    Args:
        array: in NPY format.
        shape: expected shape.
        dtype: expected type.

    Raises:
        UndecodableError: it is of another shape or type, or does not parse.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if array.stype != "numpy.ndarray":
        raise UndecodableError(f"must be serialised as numpy.ndarray, got {array.stype!r}")
    if len(array.data) > size + _MAX_HEADER:
        raise UndecodableError(f"must hold {size} bytes of shape {shape}, got {len(array.data)}")
    file = BytesIO(array.data)
    try:
        version = npy.read_magic(file)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[
            version
        ]
        found_shape, fortran, found_dtype = read_header(file, max_header_size=_MAX_HEADER)
    except Exception as error:
        # The parser of numpy raises many types on hostile bytes; all mean the same here.
        raise UndecodableError(f"not an NPY array ({type(error).__name__})") from None
    if tuple(found_shape) != tuple(shape) or tuple(array.shape) != tuple(shape):
        raise UndecodableError(
            f"shape must be {tuple(shape)}, got {tuple(found_shape)} (labelled {tuple(array.shape)})"
        )
    if found_dtype != dtype or array.dtype != str(dtype):
        raise UndecodableError(
            f"type must be {dtype}, got {found_dtype} (labelled {array.dtype[:32]})"
        )
    data = array.data[file.tell() :]
    if len(data) != size:
        raise UndecodableError(f"must hold {size} bytes of data, got {len(data)}")
    flat = np.frombuffer(data, dtype=dtype)
    return flat.reshape(shape, order="F" if fortran else "C").copy(order="C")


def decode_raw(array: Array, length: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Decode a vector without a header, the format of masked vectors; the result is read-only, not a copy.

    Args:
        array: whose bytes are its values only.
        length: expected number of values.
        dtype: expected type.

    Returns:
        ``(length,)`` of ``dtype``.

    Raises:
        UndecodableError: it is not of this length and type.
    """
    if (array.stype, array.dtype, tuple(array.shape)) != ("raw", dtype.name, (length,)):
        raise UndecodableError(
            f"must be {length} raw {dtype.name}, got {array.stype[:32]!r} {array.dtype[:32]!r}"
        )
    if len(array.data) != length * dtype.itemsize:
        raise UndecodableError(
            f"must hold {length * dtype.itemsize} bytes of data, got {len(array.data)}"
        )
    return np.frombuffer(array.data, dtype=dtype)


def encode(a: NDArray[Any]) -> Array:
    """Encode a tensor in NPY format (numpy.lib.format, version 1)."""
    if not a.flags.c_contiguous or a.dtype.hasobject:
        return Array(a)
    header = BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(a))
    data = b"".join([header.getvalue(), a.reshape(-1).view(np.uint8).data])
    return Array(dtype=str(a.dtype), shape=tuple(a.shape), stype="numpy.ndarray", data=data)
