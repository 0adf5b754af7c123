"""A model's tensors as one Flower Array, for the way over the network.

Flower moves every Array as objects of their own, each a request over each hop; a model of twelve tensors costs some
27 requests where one Array costs five. So tensors travel packed: a header that names them, then their bytes as they
are. Both ends accept the plain form too, which is what a simulation uses.

The header is JSON, ``[[name, dtype, shape, stype, nbytes], ...]``, after its own length in eight bytes, big-endian.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from flwr.app import Array, ArrayRecord

#: Name of the only Array of a packed record.
NAME: Final = "fedge.packed"
STYPE: Final = "fedge.packed.v1"
#: Most tensors of a model, and largest header in bytes.
MOST: Final = 100_000
LARGEST_HEADER: Final = 32 * 2**20
_LENGTH: Final = 8


class UnpackableError(ValueError):
    """The bytes are not a packed record."""


def is_packed(record: ArrayRecord) -> bool:
    """Whether a record claims to be packed."""
    return list(record) == [NAME]


def pack(record: ArrayRecord) -> ArrayRecord:
    """One Array that holds all of a record's, in their order."""
    entries = [[n, a.dtype, list(a.shape), a.stype, len(a.data)] for n, a in record.items()]
    header = json.dumps(entries).encode()
    parts = [len(header).to_bytes(_LENGTH, "big"), header, *(a.data for a in record.values())]
    data = b"".join(parts)
    return ArrayRecord({NAME: Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})


def unpack(record: ArrayRecord) -> ArrayRecord:
    """The Arrays that were packed; what their bytes hold is not looked at here.

    Raises:
        UnpackableError: the record is not as ``pack`` makes it.
    """
    if not is_packed(record) or record[NAME].stype != STYPE:
        raise UnpackableError("must be one packed array, got another record")
    data = memoryview(record[NAME].data)
    size = int.from_bytes(data[:_LENGTH], "big")
    start = _LENGTH + size
    if size > LARGEST_HEADER or start > len(data):
        raise UnpackableError(f"header: must lie within {len(data)} bytes, got {size}")
    try:
        entries = json.loads(bytes(data[_LENGTH:start]))
    except (ValueError, RecursionError):
        raise UnpackableError("header: must be JSON, got other bytes") from None
    if not isinstance(entries, list) or len(entries) > MOST:
        raise UnpackableError(f"header: must list at most {MOST} tensors, got something else")
    found: dict[str, Array] = {}
    for entry in entries:
        name, dtype, shape, stype, nbytes = _checked(entry)
        if name in found or nbytes > len(data) - start:
            raise UnpackableError(f"{name[:80]}: must be there once and whole, got otherwise")
        content = bytes(data[start : start + nbytes])
        found[name] = Array(dtype=dtype, shape=shape, stype=stype, data=content)
        start += nbytes
    if start != len(data):
        raise UnpackableError(f"data: must end with the last tensor, got {len(data) - start} more")
    return ArrayRecord(found)


def _checked(entry: Any) -> tuple[str, str, tuple[int, ...], str, int]:
    if not isinstance(entry, list) or len(entry) != 5:
        raise UnpackableError("header: must give five facts a tensor, got otherwise")
    name, dtype, shape, stype, nbytes = entry
    texts = all(isinstance(text, str) and len(text) <= 1000 for text in (name, dtype, stype))
    sizes = isinstance(shape, list) and len(shape) <= 32
    if not texts or not sizes or not all(_natural(n) for n in [nbytes, *shape]):
        raise UnpackableError("header: must hold names, types and sizes, got otherwise")
    if math.prod(shape) > 2**48:
        raise UnpackableError(f"{name[:80]}: must have at most 2**48 elements, got more")
    return name, dtype, tuple(shape), stype, nbytes


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48
