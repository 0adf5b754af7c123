"""Real numbers in the ring: the sum is exact, never wraps, and is off by less than a step for each site."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedge.shared.crypto.keystream import keystream
from fedge.shared.errors import SiteError
from fedge.shared.secagg import fixed_point
from fedge.shared.secagg.fixed_point import Segment, decode, encode, scale

KEY = bytes(range(32))
SITES = [3, 10, 50, 128, 1000]
HALF = 2**31 - 1


def one(size: int, bound: float = 1.0) -> list[Segment]:
    return [Segment("update", size, bound)]


def signed(vector: NDArray[np.uint32]) -> NDArray[np.int64]:
    return vector.view(np.int32).astype(np.int64)


def key_of(site: int) -> bytes:
    return site.to_bytes(32, "big")


@pytest.mark.parametrize("sites", [1, *SITES, 12_345, fixed_point.MAX_SITES])
@pytest.mark.parametrize("bound", [1.0, 0.1, 1e-6, 3e7])
def test_the_scale_leaves_a_step_for_each_site(sites: int, bound: float) -> None:
    steps = round(scale(bound, sites) * bound)
    assert steps == HALF // sites - 1
    assert abs(scale(bound, sites) * bound - steps) < 1e-3
    assert sites * (steps + 1) <= HALF < sites * (steps + 2)


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("bound", [1.0, 0.1, 1 / 3, 123.456])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_sites_at_the_bound_do_not_wrap(sites: int, bound: float, dtype: type) -> None:
    """Both signs, beyond and exactly at the bound, over many rounding keys: each site stays within its share."""
    size = 2000
    values = np.full(size, bound, dtype)
    values[1::2] *= -2
    most = HALF // sites
    for site in range(min(sites, 10)):
        found = signed(encode(values, 1.0, one(size, bound), sites, key_of(site)).vector)
        assert abs(found).max() <= most
        assert (found[::2] >= most - 2 - most * 1e-7).all()
        assert (found[1::2] <= 2 - most).all()
    # The worst that sites can send adds up within the ring's half.
    total = (np.uint64(sites) * np.uint64(abs(found).max())).astype(np.uint32).reshape(1)
    assert signed(total)[0] == sites * int(abs(found).max()) <= HALF
    assert decode(total, one(1, bound), sites)[0] == pytest.approx(sites * bound, rel=1e-3)


@pytest.mark.slow
@given(
    st.sampled_from(SITES),
    st.floats(1e-6, 1e6),
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=60)
def test_the_sum_is_exact_and_close_to_the_true_one(
    sites: int, bound: float, seed: int, dtype: type
) -> None:
    rng = np.random.default_rng(seed)
    size = 200
    segments = [Segment("update", 150, bound), Segment("state", 50, 3 * bound)]
    bounds = np.repeat([bound, 3 * bound], [150, 50])
    total, integers = np.zeros(size, np.uint32), np.zeros(size, np.int64)
    true = np.zeros(size)
    saturated = 0
    for site in range(sites):
        values = (rng.standard_normal(size) * bounds).astype(dtype)
        weight = float(rng.random())
        found = encode(values, weight, segments, sites, key_of(site))
        assert found.vector.dtype == np.uint32
        exact = values.astype(np.float64)
        beyond = abs(exact) > bounds
        assert found.saturated == beyond.sum()
        saturated += found.saturated
        total += found.vector
        integers += signed(found.vector)
        true += weight * exact.clip(-bounds, bounds)
    assert saturated
    # Exact: what was added modulo 2^32 is the sum of the integers.
    np.testing.assert_array_equal(signed(total), integers)
    decoded = decode(total, segments, sites)
    assert decoded.dtype == np.float64
    step = np.array([1 / scale(b, sites) for b in (bound, 3 * bound)]).repeat([150, 50])
    assert (abs(decoded - true) <= sites * step * (1 + 1e-6)).all()


def test_one_value_by_hand() -> None:
    """Three sites, bound 1: 715827881 steps; a quarter of it is 178956970.25, rounded up where r is high."""
    size = 1000
    found = encode(np.full(size, 0.5), 0.5, one(size), 3, KEY)
    random = np.frombuffer(keystream(KEY).update(bytes(2 * size)), "<u2").astype(np.int64)
    expected = 178956970 + (random + 0.25 * 2**16 >= 2**16)
    np.testing.assert_array_equal(signed(found.vector), expected)
    assert {178956970, 178956971} == set(expected.tolist())
    negative = encode(np.full(size, -0.5), 0.5, one(size), 3, KEY)
    np.testing.assert_array_equal(
        signed(negative.vector), -178956971 + (random + 0.75 * 2**16 >= 2**16)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_coordinate_is_the_floor_of_the_exact_number(dtype: type) -> None:
    """In exact fractions: within one step of the weighted value, on the side that the random bits say."""
    size, sites, weight = 500, 10, 0.7
    values = np.random.default_rng(1).uniform(-1, 1, size).astype(dtype)
    segments = [Segment("a", 200, 0.9), Segment("b", 300, 1.7)]
    found = signed(encode(values, weight, segments, sites, KEY).vector)
    random = np.frombuffer(keystream(KEY).update(bytes(2 * size)), "<u2")
    for i, value in enumerate(values):
        bound = Fraction(0.9 if i < 200 else 1.7)
        clamped = max(-bound, min(bound, Fraction(float(value))))
        exact = clamped * Fraction(weight) * (HALF // sites - 1) / bound
        # One unit of 2^-16 is what rounding to Z and float64 may be off.
        low, high = (exact + Fraction(int(random[i]) + d, 2**16) for d in (-1, 1))
        assert low // 1 <= found[i] <= high // 1


def test_rounding_is_right_on_average() -> None:
    """A fixed key: the mean of 400 000 roundings lies within four standard deviations."""
    size = 400_000
    steps = scale(1.0, 1000)
    for part in (0.0, 0.1, 0.25, 0.5, 0.9, 0.999):
        values = np.full(size, (1000 + part) / steps)
        found = signed(encode(values, 1.0, one(size), 1000, KEY).vector)
        assert set(found.tolist()) <= {1000, 1001}
        deviation = np.sqrt(part * (1 - part) / size)
        assert abs(found.mean() - 1000 - part) <= 4 * deviation + 2**-16
        mirrored = signed(encode(-values, 1.0, one(size), 1000, KEY).vector)
        assert abs(mirrored.mean() + 1000 + part) <= 4 * deviation + 2**-16


def test_neighbouring_coordinates_round_independently_and_keys_differ() -> None:
    size = 100_000
    values = np.full(size, 0.5 / scale(1.0, 10))
    up = signed(encode(values, 1.0, one(size), 10, KEY).vector)
    other = signed(encode(values, 1.0, one(size), 10, bytes(32)).vector)
    for a, b in ((up[:-1], up[1:]), (up, other), (up[:-16_384], up[16_384:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(size - 16_384)
    np.testing.assert_array_equal(up, signed(encode(values, 1.0, one(size), 10, KEY).vector))


def test_segments_and_chunks_change_nothing_but_the_bounds() -> None:
    """The same values in one segment or many, of odd lengths, across the working memory's borders."""
    sizes = [1, 16_383, 0, 16_384, 16_385, 3, 40_001]
    size = sum(sizes)
    values = np.random.default_rng(2).standard_normal(size).astype(np.float32)
    whole = encode(values, 0.3, one(size, 1.5), 10, KEY)
    parts = [Segment(f"s{i}", n, 1.5) for i, n in enumerate(sizes)]
    split = encode(values, 0.3, parts, 10, KEY)
    np.testing.assert_array_equal(split.vector, whole.vector)
    assert split.saturated == whole.saturated == (abs(values) > 1.5).sum()
    np.testing.assert_array_equal(
        decode(whole.vector, parts, 10), decode(whole.vector, one(size, 1.5), 10)
    )


def test_weight_zero_gives_zeros_and_empty_vectors_are_empty() -> None:
    values = np.array([5.0, -5.0, 0.5, -0.0], np.float32)
    found = encode(values, 0.0, one(4), 3, KEY)
    assert found.vector.tolist() == [0, 0, 0, 0]
    assert found.saturated == 2
    assert encode(values * 0, 1.0, one(4), 3, KEY).vector.tolist() == [0, 0, 0, 0]
    empty = encode(values[:0], 1.0, [], 3, KEY)
    assert (empty.vector.size, empty.saturated) == (0, 0)
    assert decode(empty.vector, [], 3).size == 0


def test_the_values_are_left_alone_and_may_be_strided_or_read_only() -> None:
    values = np.random.default_rng(3).standard_normal(40_000).astype(np.float32)
    kept = values.copy()
    values.flags.writeable = False
    found = encode(values[::2], 1.0, one(20_000, 2.0), 5, KEY)
    np.testing.assert_array_equal(values, kept)
    again = encode(values[::2].copy(), 1.0, one(20_000, 2.0), 5, KEY)
    np.testing.assert_array_equal(found.vector, again.vector)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 16_384, 20_000, 39_999])
def test_a_value_that_is_not_finite_is_refused(dtype: type, bad: float, at: int) -> None:
    values = np.zeros(40_000, dtype)
    values[at] = bad
    segments = [Segment("update", 20_000, 1.0), Segment("state", 20_000, 1.0)]
    name = "update" if at < 20_000 else "state"
    for weight in (0.0, 1.0):
        with pytest.raises(SiteError, match=f"FE-401 {name}: must be finite"):
            encode(values, weight, segments, 3, KEY)


@pytest.mark.parametrize("huge", [1e9, 3e38, -3e38])
def test_huge_values_saturate(huge: float) -> None:
    found = encode(np.array([huge, 0.0], np.float32), 1.0, one(2), 3, KEY)
    assert found.saturated == 1
    assert decode(found.vector, one(2), 3)[0] == pytest.approx(np.sign(huge), abs=1e-8)
    wide = encode(np.array([1.7e308, -1e-320]), 1.0, one(2, 1e-5), 3, KEY)
    assert wide.saturated == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"values": np.zeros((2, 2))},
            "values: must be one-dimensional float32 or float64, got 2-",
        ),
        ({"values": np.zeros(4, np.int64)}, "float32 or float64, got 1-dimensional int64"),
        ({"values": np.zeros(4, np.float16)}, "float32 or float64, got 1-dimensional float16"),
        ({"values": np.zeros(5)}, "segments: must have 5 coordinates together, got 4"),
        ({"segments": [Segment("a", 5, 1.0), Segment("b", -1, 1.0)]}, "sizes of 0 or more"),
        ({"segments": one(4, 0.0)}, "bound: must be 1e-200 to 1e200, got 0.0"),
        ({"segments": one(4, -1.0)}, "bound: must be"),
        ({"segments": one(4, float("nan"))}, "bound: must be"),
        ({"segments": one(4, float("inf"))}, "bound: must be"),
        ({"weight": -0.1}, "weight: must be 0 to 1, got -0.1"),
        ({"weight": 1.0000001}, "weight: must be 0 to 1"),
        ({"weight": float("nan")}, "weight: must be 0 to 1"),
        ({"sites": 0}, "sites: must be 1 to 1048576, got 0"),
        ({"sites": 2**20 + 1}, "sites: must be"),
        ({"sites": 3.0}, "sites: must be"),
        ({"rounding_key": b"short"}, "key: must be 32 bytes, got 5"),
    ],
)
def test_a_caller_s_defects_are_refused(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "values": np.zeros(4),
        "weight": 1.0,
        "segments": one(4),
        "sites": 3,
        "rounding_key": KEY,
    }
    encode(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        encode(**{**good, **change})  # type: ignore[arg-type]


def test_decoding_refuses_other_totals() -> None:
    total = np.zeros(4, np.uint32)
    for bad, message in (
        (total.reshape(2, 2), "total: must be one-dimensional uint32"),
        (total.astype(np.int32), "got 1-dimensional int32"),
        (total[:3], "segments: must have 3 coordinates together, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(bad, one(4), 3)
    with pytest.raises(ValueError, match="sites"):
        decode(total, one(4), 0)


def test_a_vector_is_written_where_it_is_wanted() -> None:
    values = np.random.default_rng(4).standard_normal(20_000).astype(np.float32)
    whole = np.full(20_006, 7, np.uint32)
    found = encode(values, 0.4, one(20_000, 2.0), 5, KEY, whole[:20_000])
    assert np.shares_memory(found.vector, whole)
    np.testing.assert_array_equal(
        whole[:20_000], encode(values, 0.4, one(20_000, 2.0), 5, KEY).vector
    )
    assert whole[20_000:].tolist() == [7] * 6
    for bad in (whole, whole[:20_000].view(np.int32)):
        with pytest.raises(ValueError, match="out: must be 20000 values of uint32"):
            encode(values, 0.4, one(20_000, 2.0), 5, KEY, bad)


def test_a_mean_is_the_sum_by_the_weight() -> None:
    values = np.random.default_rng(5).standard_normal(30_000)
    segments = [Segment("a", 10_000, 4.0), Segment("b", 20_000, 9.0)]
    total = sum(
        (encode(values, w, segments, 3, key_of(i)).vector for i, w in enumerate((0.2, 0.5))),
        np.zeros(30_000, np.uint32),
    )
    mean = decode(total, segments, 3, 0.7)
    np.testing.assert_allclose(mean, decode(total, segments, 3) / 0.7, rtol=1e-15)
    np.testing.assert_allclose(mean, values, atol=3e-8)
    rounded = np.empty(30_000, np.float32)
    assert decode(total, segments, 3, 0.7, rounded) is rounded
    # Three roundings: of the number of steps, of their product, and of a step itself.
    np.testing.assert_allclose(rounded, mean, rtol=3 * 2**-24)
    for room in (rounded[1:], rounded.astype(np.float16)):
        with pytest.raises(ValueError, match="out: must be 30000 floats"):
            decode(total, segments, 3, 0.7, room)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight: must be above 0 and finite"):
            decode(total, segments, 3, bad)


def test_the_number_of_sites_is_that_of_the_encoding() -> None:
    """The failing twin: decoded with the number that is left, the sum is wrong by their ratio."""
    total = encode(np.full(4, 0.5), 1.0, one(4), 10, KEY).vector
    assert decode(total, one(4), 10)[0] == pytest.approx(0.5, abs=1e-8)
    assert decode(total, one(4), 7)[0] == pytest.approx(0.35, abs=1e-6)
