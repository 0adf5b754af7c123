"""What travels in the exchanges: read back as it was written, refused where it is anything else."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedge.shared import protocol
from fedge.shared.secagg import messages
from fedge.shared.secagg.messages import ENCRYPTED_SHARE_BYTES, Sharer, Signed

SHARERS = [
    Sharer("north", bytes([1]) * 32, bytes([2]) * 64, bytes([3]) * ENCRYPTED_SHARE_BYTES),
    Sharer("south", bytes([4]) * 32, bytes([5]) * 64, b""),
]
SIGNED = [Signed("north", bytes([1]) * 64), Signed("south", bytes([2]) * 64)]


def of(key, raw):
    return messages.record({key: raw})


def test_sharers_are_read_as_they_were_written():
    raw = messages.joined(SHARERS)
    assert messages.sharers_of(of("sharers", raw)) == SHARERS
    assert messages.sharers_of(of("sharers", b"")) == []


def test_signatures_are_read_as_they_were_written():
    assert messages.signatures_of(of("signatures", messages.joined(SIGNED))) == SIGNED


def test_a_full_list_fits_the_bound():
    names = sorted("x" * 57 + f"{i:07}" for i in range(protocol.MAX_SITES))
    sharers = [Sharer(n, bytes(32), bytes(64), bytes(ENCRYPTED_SHARE_BYTES)) for n in names]
    assert len(messages.sharers_of(of("sharers", messages.joined(sharers)))) == 2048
    signed = [Signed(n, bytes(64)) for n in names]
    assert len(messages.signatures_of(of("signatures", messages.joined(signed)))) == 2048


@pytest.mark.parametrize("cut", range(1, 102, 5))
def test_a_part_of_a_list_is_refused(cut):
    raw = messages.joined(SHARERS)[:-cut]
    with pytest.raises(ValueError, match="must hold"):
        messages.sharers_of(of("sharers", raw))
    if cut < 65:
        with pytest.raises(ValueError, match="must hold"):
            messages.signatures_of(of("signatures", messages.joined(SIGNED)[:-cut]))


def test_a_box_of_another_length_is_refused():
    for size in (1, ENCRYPTED_SHARE_BYTES - 1, ENCRYPTED_SHARE_BYTES + 1, 255):
        raw = Sharer("north", bytes(32), bytes(64), bytes(size)).encode()
        with pytest.raises(
            ValueError,
            match=f"encrypted share: must be {ENCRYPTED_SHARE_BYTES} bytes or none, got {size}",
        ):
            messages.sharers_of(of("sharers", raw))


def test_lists_out_of_order_or_with_one_twice_are_refused():
    for items in (SHARERS[::-1], SHARERS[:1] * 2):
        with pytest.raises(ValueError, match="sorted and without duplicates"):
            messages.sharers_of(of("sharers", messages.joined(items)))
    for items in (SIGNED[::-1], SIGNED[:1] * 2):
        with pytest.raises(ValueError, match="sorted and without duplicates"):
            messages.signatures_of(of("signatures", messages.joined(items)))


@pytest.mark.parametrize(
    ("read", "key"),
    [
        (messages.bundles_of, "bundles"),
        (messages.sharers_of, "sharers"),
        (messages.signatures_of, "signatures"),
    ],
)
def test_what_is_missing_too_long_or_no_bytes_is_refused(read, key):
    most = 2048 * (320 if key == "sharers" else 256)
    for values in ({}, {key: "text"}, {key: 1}, {key: [b""]}, {key: bytes(most + 1)}):
        with pytest.raises(ValueError, match=f"{key}: must be 0 to {most} bytes, got "):
            read(ConfigRecord(values))


def test_data_has_bounds():
    values = messages.record({"signature": bytes(64)})
    assert messages.data(values, "signature", 64, 64) == bytes(64)
    for most, least in ((63, 0), (100, 65)):
        with pytest.raises(ValueError, match="got 64"):
            messages.data(values, "signature", most, least)


@pytest.mark.parametrize("value", [0, 4, 2.0, True, "2", b"2", None])
def test_an_integer_is_one_in_range(value):
    values = ConfigRecord({} if value is None else {"attempt": value})
    with pytest.raises(ValueError, match="attempt: must be an integer from 1 to 3"):
        messages.integer(values, "attempt", 1, 3)
    assert messages.integer(ConfigRecord({"attempt": 3}), "attempt", 1, 3) == 3


def test_values_are_those_of_the_record_alone():
    record = messages.record({"attempt": 1})
    assert messages.values_of(RecordDict({messages.SECURE: record})) is record
    for content in (RecordDict(), RecordDict({messages.SECURE: MetricRecord({"attempt": 1})})):
        with pytest.raises(ValueError, match="must hold a secagg record"):
            messages.values_of(content)


def test_a_vector_takes_four_bytes_a_value():
    vector = np.array([0, 1, 2**32 - 1], np.uint32)
    array = messages.vector_record(vector)[messages.VECTOR]
    assert array.data == b"\0\0\0\0\x01\0\0\0\xff\xff\xff\xff"
    assert (array.dtype, tuple(array.shape), array.stype) == ("uint32", (3,), "raw")
