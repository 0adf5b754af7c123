"""Counters add up exactly, to the last bit, over as many sites as are allowed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedge.shared.errors import RunError, SiteError
from fedge.shared.secagg import masking
from fedge.shared.secagg.exact_counters import Counter, decode_counters, encode_counters

#: The widest ranges that there are, on either side of 0 and around it, and narrow ones.
COUNTERS = (
    Counter("sites", 0, 1),
    Counter("widest", 0, 2**60),
    Counter("below", -(2**60), 0),
    Counter("around", -(2**59), 2**59),
    Counter("examples", 0, 1000),
    Counter("loss", 0, 2**39, 20),
    Counter("noised", -(2**39), 2**39, 20),
    Counter("squares", -(2**23), 2**23, 36),
    Counter("fine", -1, 0, 60),
)


def add(vectors: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    total = np.zeros_like(vectors[0])
    for vector in vectors:
        masking.add_counters(total, vector)
    return total


def times(vector: NDArray[np.uint64], sites: int) -> NDArray[np.uint64]:
    """The sum over so many sites that hold the same, in Python's whole numbers."""
    found = [sites * (int(low) + (int(high) << 64)) % 2**128 for low, high in vector]
    return np.array([(v % 2**64, v >> 64) for v in found], np.uint64).reshape(-1, 2)


def halves(total: int) -> NDArray[np.uint64]:
    return np.array([[total % 2**64, total >> 64]], np.uint64)


def drawn(counter: Counter) -> st.SearchStrategy[float]:
    if counter.fraction_bits:
        return st.floats(counter.low, counter.high)
    return st.integers(counter.low, counter.high)


def units(counter: Counter, value: float) -> int:
    return round(Fraction(value) * 2**counter.fraction_bits)


@given(st.lists(st.tuples(*map(drawn, COUNTERS)), min_size=1, max_size=12), st.integers(1, 2048))
@settings(max_examples=150)
def test_sums_are_exact(rows: list[tuple[float, ...]], sites: int) -> None:
    """The rows are repeated until they are so many sites."""
    encoded = [
        encode_counters({c.name: v for c, v in zip(COUNTERS, row, strict=True)}, COUNTERS)
        for row in rows
    ]
    counts = [len(range(i, sites, len(rows))) for i in range(len(rows))]
    total = add([times(vector, n) for vector, n in zip(encoded, counts, strict=True)])
    found = decode_counters(total, COUNTERS, sites)
    assert list(found) == [c.name for c in COUNTERS]
    for i, counter in enumerate(COUNTERS):
        exact = sum(n * units(counter, row[i]) for row, n in zip(rows, counts, strict=True))
        if counter.fraction_bits:
            assert found[counter.name] == exact / 2**counter.fraction_bits
        else:
            assert type(found[counter.name]) is int
            assert found[counter.name] == exact


@pytest.mark.parametrize("counter", COUNTERS, ids=lambda c: c.name)
@pytest.mark.parametrize("end", ["low", "high"])
def test_2048_sites_at_either_end(counter: Counter, end: str) -> None:
    value = getattr(counter, end)
    vector = encode_counters({counter.name: value}, [counter])
    total = times(vector, 2048)
    assert decode_counters(total, [counter], 2048) == {counter.name: 2048 * value}


def test_2048_real_additions() -> None:
    rng = np.random.default_rng(0)
    counters = (Counter("a", -(2**59), 2**59 - 1), Counter("b", 0, 2**39, 20))
    whole = [int(v) for v in rng.integers(-(2**59), 2**59, 2048)]
    real = [float(v) for v in rng.random(2048) * 2**39]
    total = add(
        [encode_counters({"a": a, "b": b}, counters) for a, b in zip(whole, real, strict=True)]
    )
    found = decode_counters(total, counters, 2048)
    assert found["a"] == sum(whole)
    assert found["b"] == sum(units(counters[1], b) for b in real) / 2**20


def test_elements_by_hand() -> None:
    value = 5 * 2**40 + 7 * 2**20 + 9
    assert encode_counters({"a": value}, [Counter("a", 0, 2**60)]).tolist() == [[value, 0]]
    assert encode_counters({"a": -3}, [Counter("a", -5, 5)]).tolist() == [[2, 0]]
    assert encode_counters({"a": 1.5}, [Counter("a", 0, 2, 4)]).tolist() == [[24, 0]]
    assert encode_counters({}, []).tolist() == []


@pytest.mark.parametrize(
    ("ours", "others"),
    [
        ((10.5, 20.5, 30.0), (10.0, 20.0, 31.0)),
        ((2.0**20 - 1, 1.0), (2.0**19, 2.0**19)),
        ((0.0, 0.0, 3 * 2.0**21), (2.0**21, 2.0**21, 2.0**21)),
    ],
)
def test_sites_with_the_same_sum_cannot_be_told_apart(
    ours: tuple[float, ...], others: tuple[float, ...]
) -> None:
    """In limbs of 20 bits with a sum each, the carries told these apart."""
    for counter in (Counter("a", 0, 2**39, 20), Counter("a", -(2**39), 2**39, 20)):
        one, other = (
            add([encode_counters({"a": v}, [counter]) for v in values]).tolist()
            for values in (ours, others)
        )
        assert one == other


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.int64(3), np.uint8(3), np.float64(3)])
def test_every_kind_of_number_is_taken(value: float) -> None:
    counters = [Counter("a", 0, 10)]
    assert decode_counters(encode_counters({"a": value}, counters), counters, 1) == {"a": 3}


def test_fractions_round_to_the_nearest_unit() -> None:
    counters = [Counter("a", -1, 1, 4)]
    for value, expected in ((0.1, 0.125), (-0.1, -0.125), (1 / 64, 0.0), (0.99, 1.0), (-1.0, -1.0)):
        found = decode_counters(encode_counters({"a": value}, counters), counters, 1)
        assert found == {"a": expected}


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        11,
        -1,
        10.5,
        -0.001,
        1e9,
        2**70,
        -(10**400),
        np.float32("nan"),
    ],
    ids=lambda v: str(v)[:9],
)
@pytest.mark.parametrize("fraction_bits", [0, 8])
def test_a_value_outside_is_refused_and_not_quoted(value: float, fraction_bits: int) -> None:
    with pytest.raises(SiteError, match=r"^FE-401 a: must be 0 to 10, got (NaN|a value outside)$"):
        encode_counters({"a": value}, [Counter("a", 0, 10, fraction_bits)])


def test_a_fraction_where_a_whole_number_is_due_is_refused() -> None:
    with pytest.raises(SiteError, match="FE-401 a: must be a whole number, got a fraction"):
        encode_counters({"a": 1.5}, [Counter("a", 0, 10)])


@pytest.mark.parametrize(
    ("names", "counted"),
    [(["a"], ["a", "b"]), (["a", "b"], ["a"]), (["a"], ["b"]), (["a"], ["a", "a"])],
)
def test_other_names_are_refused(names: list[str], counted: list[str]) -> None:
    with pytest.raises(ValueError, match="counters: must be named as the values are"):
        encode_counters(dict.fromkeys(names, 1), [Counter(name, 0, 10) for name in counted])


@pytest.mark.parametrize(
    ("low", "high", "fraction_bits"),
    [(0, 2**60 + 1, 0), (0, 0, 0), (1, 0, 0), (0, 2**40, 21), (0, 1, 61), (0, 1, -1)],
)
def test_other_ranges_are_refused(low: int, high: int, fraction_bits: int) -> None:
    with pytest.raises(ValueError, match="a: must have"):
        Counter("a", low, high, fraction_bits)


@pytest.mark.parametrize("sites", [0, -1, 2049, 3.0])
def test_other_numbers_of_sites_are_refused(sites: int) -> None:
    with pytest.raises(ValueError, match="sites: must be 1 to 2048"):
        decode_counters(np.zeros((1, 2), np.uint64), [Counter("a", 0, 1)], sites)


def test_other_totals_are_refused() -> None:
    for bad in (np.zeros(2, np.uint64), np.zeros((1, 2), np.uint32), np.zeros((1, 1), np.uint64)):
        with pytest.raises(ValueError, match="total: must be 1 pairs of uint64"):
            decode_counters(bad, [Counter("a", 0, 1)], 1)


@pytest.mark.parametrize("total", [3, 2**32 - 1, 2**64 - 1, 2**64, 2**127, 2**128 - 1])
def test_a_sum_that_no_honest_sites_give_is_refused(total: int) -> None:
    """Two sites with 0 or 1 each; noise of a mask that was not taken off looks like this."""
    with pytest.raises(RunError, match="FE-511 a: must be within 2 times its range, got more"):
        decode_counters(halves(total), [Counter("a", 0, 1)], 2)
    assert decode_counters(halves(2), [Counter("a", 0, 1)], 2) == {"a": 2}


def test_the_number_of_sites_is_that_of_the_additions() -> None:
    """The failing twin: with a negative low end, another number shifts the sum."""
    counters = [Counter("a", -10, 10)]
    total = add([encode_counters({"a": v}, counters) for v in (1, 2, 3)])
    assert decode_counters(total, counters, 3) == {"a": 6}
    assert decode_counters(total, counters, 4) == {"a": -4}
