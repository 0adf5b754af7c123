"""Shamir's sharing: any threshold of shares give the secret, fewer nothing, and wrong ones are found and named."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.shared.secagg import shamir
from fedge.shared.secagg.shamir import PRIME, SHARE_BYTES, UnrecoverableError

SECRET = bytes(range(32))


def share(value: int) -> bytes:
    return value.to_bytes(SHARE_BYTES, "big")


def spoilt(shares: dict[int, bytes], wrong: set[int], seed: int = 0) -> dict[int, bytes]:
    """The shares with those of ``wrong`` off the polynomial."""
    chance = random.Random(seed)
    off = {x: chance.randrange(1, PRIME) for x in wrong}
    return {
        x: share((int.from_bytes(s, "big") + off[x]) % PRIME) if x in off else s
        for x, s in shares.items()
    }


def is_secret(found: bytes) -> bool:
    return found == SECRET


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
        with pytest.raises(UnrecoverableError):
            shamir.recover(few, 2, is_secret)


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
def test_a_malformed_share_is_refused_and_in_recovery_named(bad: bytes) -> None:
    shares = {**shamir.split(SECRET, 2, [1, 2, 3]), 2: bad}
    with pytest.raises(ValueError, match="share of 2"):
        shamir.combine(shares, 2)
    assert shamir.recover(shares, 2, is_secret) == shamir.Recovered(SECRET, (2,))


def test_a_value_that_is_no_secret_is_refused() -> None:
    """The field has 297 values more than there are secrets."""
    shares = {1: share(2**256 + 5)}
    with pytest.raises(ValueError, match="secret of 32 bytes"):
        shamir.combine(shares, 1)
    with pytest.raises(UnrecoverableError):
        shamir.recover(shares, 1, lambda _: True)
    assert shamir.combine({1: share(2**256 - 1)}, 1) == b"\xff" * 32


def test_no_secret_in_what_is_printed() -> None:
    found = shamir.recover(shamir.split(SECRET, 2, [1, 2]), 2, is_secret)
    assert repr(found) == "Recovered(wrong=())"
    with pytest.raises(ValueError) as caught:
        shamir.combine({1: share(2**256)}, 1)
    assert str(2**256) not in str(caught.value)


@pytest.mark.parametrize("shares", [7, 8, 9, 10, 11, 14])
@pytest.mark.parametrize("wrong", [0, 1, 2, 3])
def test_wrong_shares_are_named_wherever_they_are(shares: int, wrong: int) -> None:
    """Threshold 7; the secret is found as long as 7 shares are right."""
    whole = shamir.split(SECRET, 7, list(range(1, shares + 1)))
    chance = random.Random(shares * 10 + wrong)
    for seed in range(5):
        bad = set(chance.sample(sorted(whole), wrong))
        given = spoilt(whole, bad, seed)
        if shares - wrong >= 7:
            found = shamir.recover(given, 7, is_secret)
            assert found == shamir.Recovered(SECRET, tuple(sorted(bad)))
        else:
            with pytest.raises(UnrecoverableError, match="7 right ones"):
                shamir.recover(given, 7, is_secret)


@pytest.mark.parametrize(("holders", "threshold"), [(71, 67), (90, 86), (100, 67)])
def test_three_wrong_ones_of_a_large_cohort(holders: int, threshold: int) -> None:
    xs = [7 * i + 1 for i in range(holders)]
    bad = {xs[-1], xs[-2], xs[-3]}
    given = spoilt(shamir.split(SECRET, threshold, xs), bad)
    assert shamir.recover(given, threshold, is_secret).wrong == tuple(sorted(bad))


def test_half_of_the_spare_shares_need_no_guess() -> None:
    """33 to spare of 100: 16 wrong ones are found, and the oracle is asked twice."""
    whole = shamir.split(SECRET, 67, list(range(1, 101)))
    bad = {1, *random.Random(1).sample(range(2, 101), 15)}
    asked = []

    def oracle(found: bytes) -> bool:
        asked.append(found)
        return found == SECRET

    assert shamir.recover(spoilt(whole, bad), 67, oracle).wrong == tuple(sorted(bad))
    assert len(asked) == 2


def test_the_search_is_bounded() -> None:
    """30 liars of 100 are too many to be found, and cost the server a bounded time."""
    whole = shamir.split(SECRET, 67, list(range(1, 101)))
    with pytest.raises(UnrecoverableError):
        shamir.recover(spoilt(whole, set(range(1, 31))), 67, is_secret)


def test_liars_beyond_the_first_shares_do_not_hide_the_secret() -> None:
    """Too many to be decoded, but the shares asked first are right."""
    whole = shamir.split(SECRET, 67, list(range(1, 101)))
    bad = set(range(75, 101))
    assert shamir.recover(spoilt(whole, bad), 67, is_secret).wrong == tuple(sorted(bad))


def test_two_liars_cannot_frame_the_honest() -> None:
    """Errors at 1 and 2 that cancel at 0: the first three shares give the right secret, off a wrong polynomial."""
    whole = shamir.split(SECRET, 3, list(range(1, 9)))
    # Lagrange's weights at 0 of (1, 2, 3) are 3, -3, 1: equal errors cancel.
    crooked = {
        x: share((int.from_bytes(s, "big") + 5) % PRIME) if x in (1, 2) else s
        for x, s in whole.items()
    }
    assert shamir.combine(crooked, 3) == SECRET
    assert shamir.recover(crooked, 3, is_secret).wrong == (1, 2)


def test_recovery_asks_once_where_all_is_well_and_is_the_same_every_time() -> None:
    whole = shamir.split(SECRET, 5, list(range(1, 11)))
    asked = []
    shamir.recover(whole, 5, lambda found: asked.append(found) or found == SECRET)
    assert asked == [SECRET]
    bad = spoilt(whole, {1, 4})
    orders = []
    for order in (sorted(bad), sorted(bad, reverse=True)):
        tried: list[bytes] = []
        shamir.recover({x: bad[x] for x in order}, 5, lambda f, t=tried: t.append(f) or f == SECRET)
        orders.append(tried)
    assert orders[0] == orders[1]


def test_recovery_refuses_what_no_caller_may_pass() -> None:
    whole = shamir.split(SECRET, 2, [1, 2, 3])
    with pytest.raises(ValueError, match="threshold: must be at least 1, got 0"):
        shamir.recover(whole, 0, is_secret)
    with pytest.raises(ValueError, match="x: must be 1 to 65536, got 0"):
        shamir.recover({0: whole[1], 1: whole[1]}, 2, is_secret)
    with pytest.raises(UnrecoverableError, match="must be 4 well-formed ones, got 3"):
        shamir.recover(whole, 4, is_secret)
