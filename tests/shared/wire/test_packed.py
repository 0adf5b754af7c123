"""Packed contents: the same to the bit when unpacked, and nothing but WireError for whatever a stranger packs."""

from __future__ import annotations

import math
from contextlib import suppress

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedge.shared.wire import frames, packed
from fedge.shared.wire.frames import WireError
from fedge.shared.wire.packed import NAME, SMALL, STYPE


def content(floats: int = 6) -> RecordDict:
    """Every kind of record and value, and an array of ``floats`` numbers."""
    return RecordDict(
        {
            "arrays": ArrayRecord(
                {
                    "w": Array(np.arange(floats, dtype=np.float32)),
                    "empty": Array(np.zeros((0, 3))),
                    "scalar": Array(np.array(4)),
                }
            ),
            "config": ConfigRecord(
                {"a": 1, "b": 1.0, "c": True, "d": "text", "e": b"\x00\xff", "f": [b"x", b""]}
                | {"g": [1.5, -0.0], "h": [True, False], "i": ["ü", ""], "j": [2, 3], "k": b""}
            ),
            "metrics": MetricRecord({"x": 3, "y": 0.1, "z": [0.1, math.inf], "i": [1, 2]}),
            "bare": ConfigRecord({}),
        }
    )


def described(found: RecordDict) -> str:
    """The content with types and order, as text; an Array by its bytes."""
    return repr(
        [
            (
                name,
                type(record),
                [(k, type(v), getattr(v, "__dict__", v)) for k, v in record.items()],
            )
            for name, record in found.items()
        ]
    )


def as_value(data: object) -> RecordDict:
    return RecordDict({NAME: ConfigRecord({NAME: data})})  # type: ignore[dict-item]


def as_array(data: bytes, name: str = NAME) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
    return RecordDict({NAME: ArrayRecord({name: array})})


def bytes_of(found: RecordDict) -> bytes:
    record = found[NAME]
    value = record[NAME]
    return value.data if isinstance(value, Array) else value  # type: ignore[return-value]


def test_a_small_content_is_one_value_and_comes_back_to_the_bit() -> None:
    found = packed.pack(content())
    assert packed.is_packed(found)
    assert isinstance(found[NAME], ConfigRecord)
    assert list(found[NAME]) == [NAME]
    assert described(packed.unpack(found)) == described(content())


def test_a_large_content_is_one_array_and_comes_back_to_the_bit() -> None:
    large = content(SMALL // 4)
    found = packed.pack(large)
    assert packed.is_packed(found)
    record = found[NAME]
    assert isinstance(record, ArrayRecord)
    assert list(record) == [NAME]
    array = record[NAME]
    assert (array.dtype, array.shape, array.stype) == ("uint8", (len(array.data),), STYPE)
    assert len(array.data) > SMALL
    assert described(packed.unpack(found)) == described(large)


def test_the_largest_small_one_is_still_a_value() -> None:
    filler = SMALL - len(bytes_of(packed.pack(RecordDict({"a": _bytes(0)}))))
    assert isinstance(packed.pack(RecordDict({"a": _bytes(filler)}))[NAME], ConfigRecord)
    assert isinstance(packed.pack(RecordDict({"a": _bytes(filler + 64)}))[NAME], ArrayRecord)


def _bytes(count: int) -> ArrayRecord:
    """An array whose description is as long for any count of up to seven digits."""
    array = Array(dtype="uint8", shape=(10**6,), stype="s", data=b"\1" * max(count - 6, 0))
    return ArrayRecord({"x": array})


def test_nothing_is_packed_too() -> None:
    found = packed.pack(RecordDict())
    assert packed.is_packed(found)
    assert len(packed.unpack(found)) == 0


def test_what_is_not_packed_is_told_apart_and_left_alone() -> None:
    for plain in (content(), RecordDict(), RecordDict({"x": ConfigRecord({NAME: b""})})):
        before = described(plain)
        assert not packed.is_packed(plain)
        assert described(plain) == before
    both = RecordDict({NAME: ConfigRecord({NAME: b""}), "more": ConfigRecord({})})
    assert not packed.is_packed(both)


def test_packing_leaves_the_content_as_it_was() -> None:
    given = content()
    before = described(given)
    packed.pack(given)
    assert described(given) == before


HOSTILE = {
    "nothing": as_value(b""),
    "garbage": as_value(b"\xff" * 100),
    "garbage in an array": as_array(b"\xff" * 100),
    "text": as_value("text"),
    "a list": as_value([b"x"]),
    "another name": RecordDict({NAME: ConfigRecord({"other": b""})}),
    "another array": as_array(b"", "other"),
    "metrics": RecordDict({NAME: MetricRecord({NAME: 1})}),
    "no record": RecordDict({"other": ConfigRecord({})}),
    "an error's number": as_value(b"".join(frames.encode_reply(413))[8:]),
    "a request": as_value(b"".join(frames.encode_request(frames.Request("train", content())))[8:]),
    "a pickle": as_value(b"\x80\x04cposix\nsystem\n."),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_nobody_packed_is_refused(name: str) -> None:
    with pytest.raises(WireError):
        packed.unpack(HOSTILE[name])


@pytest.mark.parametrize("cut", [1, 3, 4, 20, -1])
def test_a_part_of_a_packed_content_is_refused(cut: int) -> None:
    data = bytes_of(packed.pack(content()))
    with pytest.raises(WireError):
        packed.unpack(as_value(data[:cut]))
    with pytest.raises(WireError):
        packed.unpack(as_value(data + b"x"))


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_gives_records_or_a_wire_error(at: int, value: int) -> None:
    data = bytearray(bytes_of(packed.pack(content())))
    data[at % len(data)] = value
    with suppress(WireError):
        assert isinstance(packed.unpack(as_value(bytes(data))), RecordDict)


def test_packed_twice_is_unpacked_once() -> None:
    """A content that was packed by its sender is no key to a second look."""
    once = packed.pack(content())
    assert described(packed.unpack(packed.pack(once))) == described(once)


def test_beyond_the_bounds_nothing_is_packed() -> None:
    many = RecordDict({str(i): ConfigRecord({}) for i in range(frames.MAX_RECORDS + 1)})
    with pytest.raises(WireError):
        packed.pack(many)
