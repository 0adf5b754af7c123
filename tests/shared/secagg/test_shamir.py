"""Shamir's sharing: any threshold of shares give the secret, and fewer nothing."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.shared.secagg import shamir
from fedge.shared.secagg.shamir import PRIME, SHARE_BYTES

SECRET = bytes(range(32))


def share(value: int) -> bytes:
    return value.to_bytes(SHARE_BYTES, "big")


def below(shares: dict[int, bytes], threshold: int) -> bytes:
    """What the shares give under a threshold; nothing where that is no secret, which is so once in 2^247."""
    try:
        return shamir.combine(shares, threshold)
    except ValueError:
        return b""


def test_the_field_is_the_smallest_above_every_secret() -> None:
    """Fermat's test holds for 40 bases, and fails for every odd number in between."""
    assert PRIME == 2**256 + 297
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in range(2, 42))
    assert all(pow(3, n - 1, n) != 1 for n in range(2**256 + 1, PRIME, 2))
    assert (PRIME.bit_length() + 7) // 8 == SHARE_BYTES


def test_a_published_example_in_our_field() -> None:
    """1234 + 166 x + 94 x^2, the example of Wikipedia's article on Shamir's sharing."""
    shares = {x: share(1234 + 166 * x + 94 * x * x) for x in range(1, 7)}
    assert [int.from_bytes(shares[x], "big") for x in (1, 2, 3)] == [1494, 1942, 2578]
    for chosen in combinations(shares, 3):
        found = shamir.combine({x: shares[x] for x in chosen}, 3)
        assert int.from_bytes(found, "big") == 1234


@given(
    st.binary(min_size=32, max_size=32),
    st.lists(st.integers(1, shamir.MAX_X), min_size=1, max_size=12, unique=True),
    st.randoms(use_true_random=False),
)
@settings(max_examples=100)
def test_any_threshold_of_shares_give_the_secret(
    secret: bytes, xs: list[int], chance: random.Random
) -> None:
    threshold = chance.randint(1, len(xs))
    shares = shamir.split(secret, threshold, xs)
    assert list(shares) == xs
    assert {len(s) for s in shares.values()} == {SHARE_BYTES}
    chosen = {x: shares[x] for x in chance.sample(xs, threshold)}
    assert shamir.combine(chosen, threshold) == secret
    assert shamir.combine(shares, threshold) == secret


def test_every_subset_of_the_threshold_and_none_below() -> None:
    shares = shamir.split(SECRET, 3, [1, 2, 3, 4, 5])
    for chosen in combinations(shares, 3):
        assert shamir.combine({x: shares[x] for x in chosen}, 3) == SECRET
    for chosen in combinations(shares, 2):
        few = {x: shares[x] for x in chosen}
        with pytest.raises(ValueError, match="threshold: must be 1 to the 2 shares, got 3"):
            shamir.combine(few, 3)
        # Passed off as shares of a lower threshold they give something else.
        assert below(few, 2) != SECRET


def test_shares_below_the_threshold_fit_every_secret() -> None:
    """With one share less, each guess at the secret has exactly one polynomial: the shares tell nothing."""
    shares = shamir.split(SECRET, 3, [1, 2, 3])
    held = {x: int.from_bytes(shares[x], "big") for x in (1, 2)}
    for guess in (bytes(32), b"\xff" * 32, SECRET):
        # The third share by Lagrange from (0, guess) and the two held: 3 f(2) - 3 f(1) + f(0) at x = 3.
        third = (3 * held[2] - 3 * held[1] + int.from_bytes(guess, "big")) % PRIME
        assert shamir.combine({**{x: shares[x] for x in held}, 3: share(third)}, 3) == guess


def test_two_splits_share_nothing() -> None:
    first, second = (shamir.split(SECRET, 2, [1, 2, 3]) for _ in range(2))
    assert all(first[x] != second[x] for x in first)
    assert shamir.split(SECRET, 1, [7]) == {7: b"\0" + SECRET}


@pytest.mark.parametrize(
    ("secret", "threshold", "xs", "message"),
    [
        (b"short", 2, [1, 2], "secret: must be 32 bytes, got 5"),
        (SECRET, 3, [1, 2], "threshold: must be 1 to the 2 shares, got 3"),
        (SECRET, 0, [1, 2], "threshold: must be 1 to the 2 shares, got 0"),
        (SECRET, 2, [1, 1], "distinct"),
        (SECRET, 2, [0, 1], "x: must be 1 to 65536, got 0"),
        (SECRET, 2, [1, 2**16 + 1], "x: must be 1 to 65536, got 65537"),
        (SECRET, 2, [1, True], "distinct"),
        (SECRET, 1, [True], "x: must be"),
    ],
)
def test_a_caller_s_defects_are_refused(
    secret: bytes, threshold: int, xs: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shamir.split(secret, threshold, xs)


@pytest.mark.parametrize(
    "bad", [b"", bytes(32), bytes(34), share(PRIME), b"\xff" * 33], ids=lambda b: b.hex()[:8]
)
def test_a_malformed_share_is_refused(bad: bytes) -> None:
    shares = {**shamir.split(SECRET, 2, [1, 2, 3]), 2: bad}
    with pytest.raises(ValueError, match="share of 2"):
        shamir.combine(shares, 2)


def test_a_value_that_is_no_secret_is_refused() -> None:
    """The field has 297 values more than there are secrets."""
    shares = {1: share(2**256 + 5)}
    with pytest.raises(ValueError, match="secret of 32 bytes"):
        shamir.combine(shares, 1)
    assert shamir.combine({1: share(2**256 - 1)}, 1) == b"\xff" * 32


def test_no_secret_in_what_is_raised() -> None:
    with pytest.raises(ValueError, match="secret of 32 bytes") as caught:
        shamir.combine({1: share(2**256)}, 1)
    assert str(2**256) not in str(caught.value)
