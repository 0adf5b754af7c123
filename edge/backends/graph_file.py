"""Checks without the onnx package that an ONNX file refers to no data outside itself.

Only the wire format of Protocol Buffers is walked (tag, length, bytes), as far as the tensors lie;
field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fedge.shared.errors import BundleError

# Message -> field number -> message of that field. Everything else is skipped.
_FIELDS: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_DATA: Final = 13
_DATA_LOCATION: Final = 14
_MAX_DEPTH: Final = 64


def refuse_external_data(onnx: bytes, name: str) -> None:
    """Refuse a model whose weights lie in other files, which no signature covers.

    Raises:
        BundleError: 706, a tensor refers to another file; 708, the bytes are not an ONNX model.
    """
    try:
        _walk(memoryview(onnx), "model", name, 0)
    except (IndexError, ValueError):
        raise BundleError(708, f"{name}: must be an ONNX model, got other bytes") from None


def _walk(data: memoryview, message: str, name: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    nested = _FIELDS.get(message, {})
    for field, value in _fields(data):
        if message == "tensor" and field in (_EXTERNAL_DATA, _DATA_LOCATION) and value:
            raise BundleError(
                706, f"{name}: must hold its weights, got a tensor kept in another file"
            )
        if field in nested and isinstance(value, memoryview):
            _walk(value, nested[field], name, depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of one message; fixed-width values are given as 0."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
                yield tag >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case _:
                raise ValueError("unknown wire type")
        if at + size > len(data):
            raise ValueError("longer than the message")
        yield tag >> 3, data[at : at + size] if tag & 7 == 2 else 0
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("number too long")
