"""One keystream, by whichever mode is faster on this processor: the same bytes, so that sites and server agree."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedge.shared.crypto import keystream as streams
from fedge.shared.crypto.keystream import ctr, gcm, keystream

KEY = bytes(range(32))


@pytest.fixture
def measured_again() -> Iterator[None]:
    streams.rates.cache_clear()
    streams.fastest.cache_clear()
    yield
    streams.rates.cache_clear()
    streams.fastest.cache_clear()


@pytest.mark.parametrize("part", [0, 1, 255, 256, 2**40, 2**96 - 1])
def test_both_modes_make_the_same_bytes(part: int) -> None:
    pieces = (1, 15, 16, 4096, 2**20 + 3)
    one, other = gcm(KEY, part), ctr(KEY, part)
    for size in pieces:
        assert one.update(bytes(size)) == other.update(bytes(size))


def test_the_counter_of_both_goes_on_from_one_byte_to_the_next() -> None:
    size = 16 * (2**16 + 2)
    assert gcm(KEY).update(bytes(size)) == ctr(KEY).update(bytes(size))


@pytest.mark.parametrize("name", ["gcm", "ctr"])
def test_the_faster_one_is_taken(
    measured_again: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(streams, "rates", lambda: {"gcm": 1.0, "ctr": 1.0, name: 2.0})
    assert streams.fastest() is {"gcm": gcm, "ctr": ctr}[name]
    assert keystream(KEY, 3).update(bytes(64)) == gcm(KEY, 3).update(bytes(64))


def test_both_are_measured_and_once(measured_again: None) -> None:
    rates = streams.rates()
    assert set(rates) == {"gcm", "ctr"} and all(rate > 0 for rate in rates.values())
    assert streams.rates() is rates


@pytest.mark.parametrize("mode", [gcm, ctr, keystream])
def test_another_length_of_key_is_refused(mode: object) -> None:
    assert callable(mode)
    with pytest.raises(ValueError, match="must be 32 bytes, got 16"):
        mode(bytes(16))
