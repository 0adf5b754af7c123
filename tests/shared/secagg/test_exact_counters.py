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
from fedge.shared.secagg import exact_counters
from fedge.shared.secagg.exact_counters import Counter, decode_counters, encode_counters

#: The widest ranges that there are, on either side of 0 and around it, and narrow ones.
COUNTERS = (
    Counter("sites", 0, 1),
    Counter("widest", 0, 2**60),
    Counter("below", -(2**60), 0),
    Counter("around", -(2**59), 2**59),
    Counter("examples", 0, 1000),
    Counter("loss", 0, 2**39, 20),
    Counter("squares", -(2**23), 2**23, 36),
    Counter("fine", -1, 0, 60),
)


def add(vectors: list[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    total = np.zeros(len(vectors[0]), np.uint32)
    for vector in vectors:
        total += vector
    return total


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
    times = [len(range(i, sites, len(rows))) for i in range(len(rows))]
    total = np.zeros(exact_counters.size(COUNTERS), np.uint32)
    for vector, n in zip(encoded, times, strict=True):
        total += vector * np.uint32(n)
    found = decode_counters(total, COUNTERS, sites)
    assert list(found) == [c.name for c in COUNTERS]
    for i, counter in enumerate(COUNTERS):
        exact = sum(n * units(counter, row[i]) for row, n in zip(rows, times, strict=True))
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
    assert int(vector.max()) <= 2**20
    total = vector * np.uint32(2048)
    assert (total.astype(np.uint64) == vector.astype(np.uint64) * 2048).all()
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


def test_limbs_by_hand() -> None:
    value = 5 * 2**40 + 7 * 2**20 + 9
    assert encode_counters({"a": value}, [Counter("a", 0, 2**60)]).tolist() == [9, 7, 5]
    assert encode_counters({"a": -3}, [Counter("a", -5, 5)]).tolist() == [2, 0, 0]
    assert encode_counters({"a": 1.5}, [Counter("a", 0, 2, 4)]).tolist() == [24, 0, 0]
    assert encode_counters({"a": 2**60}, [Counter("a", 0, 2**60)]).tolist() == [0, 0, 2**20]
    assert encode_counters({}, []).size == exact_counters.size([]) == 0
    assert exact_counters.size(COUNTERS) == 3 * len(COUNTERS)


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
        decode_counters(np.zeros(3, np.uint32), [Counter("a", 0, 1)], sites)


def test_other_totals_are_refused() -> None:
    for bad in (np.zeros(2, np.uint32), np.zeros(3, np.int64), np.zeros((1, 3), np.uint32)):
        with pytest.raises(ValueError, match="total: must be 3 values of uint32"):
            decode_counters(bad, [Counter("a", 0, 1)], 1)


@pytest.mark.parametrize("total", [[3, 0, 0], [0, 1, 0], [2**32 - 1, 0, 0], [0, 0, 2**32 - 1]])
def test_a_sum_that_no_honest_sites_give_is_refused(total: list[int]) -> None:
    """Two sites with 0 or 1 each; noise of a mask that was not taken off looks like this."""
    with pytest.raises(RunError, match="FE-511 a: must be within 2 times its range, got more"):
        decode_counters(np.array(total, np.uint32), [Counter("a", 0, 1)], 2)
    assert decode_counters(np.array([2, 0, 0], np.uint32), [Counter("a", 0, 1)], 2) == {"a": 2}


@pytest.mark.parametrize("total", [[2**21 - 1, 0, 0], [0, 2**21 - 1, 0]])
def test_a_limb_that_no_honest_sites_give_is_refused(total: list[int]) -> None:
    """The sum as a whole would be in range; two sites' low limbs reach 2^21 - 2 at most."""
    counters = [Counter("a", 0, 2**60)]
    with pytest.raises(RunError, match="FE-511 a:"):
        decode_counters(np.array(total, np.uint32), counters, 2)
    allowed = np.array([limb - (limb > 0) for limb in total], np.uint32)
    decode_counters(allowed, counters, 2)


def test_the_number_of_sites_is_that_of_the_additions() -> None:
    """The failing twin: with a negative low end, another number shifts the sum."""
    counters = [Counter("a", -10, 10)]
    total = add([encode_counters({"a": v}, counters) for v in (1, 2, 3)])
    assert decode_counters(total, counters, 3) == {"a": 6}
    assert decode_counters(total, counters, 4) == {"a": -4}
