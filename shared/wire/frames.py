"""Requests and replies as bytes: between a site's relay and its worker, and packed into one record for Flower.

A frame is eight bytes of length (big-endian), then that many bytes: four of the header's length, the
header in JSON, and the arrays' bytes one after the other as the header lists them. Both ends
treat frames as untrusted input: every count, name and size is bounded, and anything else is a ``WireError``.
Only Flower's public records are used, and nothing is executed or unpickled.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

MAX_HEADER: Final = 16 * 2**20
MAX_RECORDS: Final = 16
MAX_ENTRIES: Final = 100_000
MAX_NAME: Final = 1024
MAX_DIMENSIONS: Final = 32
#: Largest frame in bytes that is read where the receiver sets no lower limit.
MAX_FRAME: Final = 64 * 2**30

_LENGTH: Final = struct.Struct(">Q")
#: Length of the prefix before a frame's body, in bytes.
LENGTH_BYTES: Final = _LENGTH.size
_HEADER: Final = struct.Struct(">I")
#: Bytes taken from the socket at a time, so that a claimed length allocates nothing.
_PIECE: Final = 1 << 20
_KIND: Final = re.compile(r"[a-z][a-z._-]{0,63}")
_BUNDLE: Final = re.compile(r"([0-9a-f]{64})?")


class WireError(ValueError):
    """Bytes that are not a valid frame, or content that no frame can hold."""


class TooLargeError(WireError):
    """A frame larger than the receiver's limit."""


@dataclass(frozen=True)
class Request:
    """A request of the relay.

    Attributes:
        kind: the message type.
        content: of the message.
        bundle: SHA-256 (hex) of the Flower bundle that the relay runs in, empty for none.
    """

    kind: str
    content: RecordDict
    bundle: str = ""


def encode_request(request: Request) -> list[bytes]:
    """The request's frame, in parts to be sent one after the other.

    Raises:
        WireError: a name, count or size is beyond its limit.
    """
    if not _KIND.fullmatch(request.kind) or not _BUNDLE.fullmatch(request.bundle):
        raise WireError("request: must have a kind and a bundle's SHA-256, got others")
    return _encode({"kind": request.kind, "bundle": request.bundle}, request.content)


def decode_request(body: bytes | bytearray) -> Request:
    """Decode the request in a frame's body.

    Raises:
        WireError: the body is not a valid request.
    """
    head, rest = _split(body, {"kind", "bundle", "records"})
    kind, bundle = head["kind"], head["bundle"]
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise WireError("kind: must be a message type, got other text")
    if not isinstance(bundle, str) or not _BUNDLE.fullmatch(bundle):
        raise WireError("bundle: must be 64 hexadecimal digits or none, got other text")
    return Request(kind, _content(head["records"], rest), bundle)


def encode_reply(reply: RecordDict | int) -> list[bytes]:
    """A reply's frame: its content, or an error's number.

    Raises:
        WireError: a name, count or size is beyond its limit.
    """
    if isinstance(reply, int):
        return _encode({"code": reply}, None)
    return _encode({}, reply)


def decode_reply(body: bytes | bytearray) -> RecordDict | int:
    """Decode the reply in a frame's body: its content, or an error's number.

    Raises:
        WireError: the body is not a valid reply.
    """
    head, rest = _split(body, {"code"}, {"records"})
    if "records" in head:
        return _content(head["records"], rest)
    code = head["code"]
    if type(code) is not int or not 100 <= code <= 999 or len(rest):
        raise WireError("code: must be an error's number alone, got another")
    return code


def send(connection: socket.socket, parts: Iterable[bytes], until: float) -> None:
    """Send the parts of a frame.

    Args:
        connection: a stream socket.
        parts: of ``encode_request`` or ``encode_reply``.
        until: deadline, on ``time.monotonic``.

    Raises:
        TimeoutError: the deadline passed.
        OSError: the connection failed.
    """
    for part in parts:
        view = memoryview(part)
        while len(view):
            connection.settimeout(_left(until))
            view = view[connection.send(view[:_PIECE]) :]


def receive(connection: socket.socket, limit: int, until: float) -> bytearray:
    """Receive a frame's body.

    Args:
        connection: a stream socket.
        limit: largest body, in bytes.
        until: deadline, on ``time.monotonic``.

    Raises:
        TooLargeError: the frame claims more than ``limit``; nothing of it was read.
        EOFError: the connection ended before the frame did.
        TimeoutError: the deadline passed.
        OSError: the connection failed.
    """
    (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, until))
    if size > limit:
        raise TooLargeError(f"frame: must hold at most {limit} bytes, got {size}")
    return _exactly(connection, size, until)


def _exactly(connection: socket.socket, size: int, until: float) -> bytearray:
    data = bytearray()
    while len(data) < size:
        connection.settimeout(_left(until))
        piece = connection.recv(min(_PIECE, size - len(data)))
        if not piece:
            raise EOFError("the connection ended within a frame")
        data += piece
    return data


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline passed")
    return left


def _encode(head: dict[str, Any], content: RecordDict | None) -> list[bytes]:
    buffers: list[bytes] = []
    if content is not None:
        head["records"] = [
            [name, *_describe(record, buffers)] for name, record in _bounded(content, MAX_RECORDS)
        ]
    text = json.dumps(head, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
        raise WireError(f"header: must hold at most {MAX_HEADER} bytes, got {len(text)}")
    size = _HEADER.size + len(text) + sum(len(b) for b in buffers)
    return [_LENGTH.pack(size) + _HEADER.pack(len(text)) + text, *buffers]


def _describe(record: Any, buffers: list[bytes]) -> tuple[str, list[Any]]:
    match record:
        case ArrayRecord():
            entries = _bounded(record, MAX_ENTRIES)
            buffers.extend(array.data for _, array in entries)
            return "arrays", [
                [name, a.dtype, list(a.shape), a.stype, len(a.data)] for name, a in entries
            ]
        case MetricRecord():
            return "metrics", [[n, v] for n, v in _bounded(record, MAX_ENTRIES)]
        case ConfigRecord():
            return "config", [[n, _plain(v)] for n, v in _bounded(record, MAX_ENTRIES)]
    raise WireError(f"record: must be one of Flower's, got {type(record).__name__}")


def _bounded(mapping: Any, maximum: int) -> list[tuple[str, Any]]:
    if len(mapping) > maximum or any(len(name) > MAX_NAME for name in mapping):
        raise WireError(f"names: must be at most {maximum}, of {MAX_NAME} characters, got more")
    return list(mapping.items())


def _plain(value: Any) -> Any:
    """A value for JSON; bytes become ``{"bytes": BASE64}``."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _split(body: bytes | bytearray, *allowed: set[str]) -> tuple[dict[str, Any], memoryview]:
    """Header and buffers; the header's keys must be one of the allowed sets."""
    if len(body) < _HEADER.size:
        raise WireError("frame: must hold a header, got fewer bytes")
    (length,) = _HEADER.unpack_from(body)
    if length > min(MAX_HEADER, len(body) - _HEADER.size):
        raise WireError("header: must lie within the frame, got a longer one")
    start = _HEADER.size + length
    try:
        head = json.loads(bytes(body[_HEADER.size : start]).decode())
    except (ValueError, RecursionError):  # UTF-8, JSON, or a number of thousands of digits
        raise WireError("header: must be JSON, got other bytes") from None
    if not isinstance(head, dict) or set(head) not in allowed:
        raise WireError("header: must be a table of the known keys, got another")
    return head, memoryview(body)[start:]


def _content(records: Any, rest: memoryview) -> RecordDict:
    content: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    at = 0
    try:
        for name, kind, entries in _rows(records, 3, MAX_RECORDS):
            match kind:
                case "arrays":
                    arrays, at = _arrays(entries, rest, at)
                    content[name] = arrays
                case "metrics":
                    content[name] = MetricRecord({n: _value(v) for n, v in _pairs(entries)})
                case "config":
                    content[name] = ConfigRecord({n: _value(v) for n, v in _pairs(entries)})
                case _:
                    raise WireError("record: must be arrays, metrics or config, got another")
        if at != len(rest):
            raise WireError(f"arrays: must fill the frame, got {len(rest) - at} bytes more")
        return RecordDict(content)
    except (TypeError, ValueError, KeyError) as error:
        # Flower's own checks of keys and values raise these.
        if isinstance(error, WireError):
            raise
        raise WireError("record: must hold values that Flower allows, got others") from None


def _arrays(entries: Any, rest: memoryview, at: int) -> tuple[ArrayRecord, int]:
    arrays: dict[str, Array] = {}
    for name, dtype, shape, stype, size in _rows(entries, 5, MAX_ENTRIES):
        if not all(isinstance(text, str) and len(text) <= MAX_NAME for text in (dtype, stype)):
            raise WireError("array: must have a type as text, got other values")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise WireError(f"shape: must have at most {MAX_DIMENSIONS} numbers, got others")
        if any(type(n) is not int or not 0 <= n < 2**63 for n in shape):
            raise WireError("shape: must hold numbers of 0 or more, got others")
        if type(size) is not int or not 0 <= size <= len(rest) - at:
            raise WireError("array: must lie within the frame, got a longer one")
        arrays[name] = Array(dtype, tuple(shape), stype, bytes(rest[at : at + size]))
        at += size
    return ArrayRecord(arrays), at


def _rows(rows: Any, width: int, maximum: int) -> Iterable[Sequence[Any]]:
    """Validate a list of at most ``maximum`` rows of ``width`` values, each beginning with a unique name."""
    if not isinstance(rows, list) or len(rows) > maximum:
        raise WireError(f"header: must list at most {maximum} entries, got others")
    names = set()
    for row in rows:
        if not isinstance(row, list) or len(row) != width:
            raise WireError(f"header: must hold rows of {width} values, got others")
        name = row[0]
        if not isinstance(name, str) or len(name) > MAX_NAME or name in names:
            raise WireError(f"name: must be new and at most {MAX_NAME} characters, got another")
        names.add(name)
    return rows


def _pairs(entries: Any) -> Iterable[Sequence[Any]]:
    return _rows(entries, 2, MAX_ENTRIES)


def _value(value: Any, depth: int = 0) -> Any:
    if isinstance(value, list) and depth == 0:
        return [_value(item, 1) for item in value]
    if isinstance(value, dict):
        if set(value) != {"bytes"} or not isinstance(value["bytes"], str):
            raise WireError("value: must be plain or bytes, got a table")
        return base64.b64decode(value["bytes"], validate=True)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise WireError("value: must fit into 64 bits, got a larger number")
    return value
