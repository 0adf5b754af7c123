"""Shamir's secret sharing of 32-byte secrets (Shamir, CACM 1979), and decoding when shares are wrong.

A secret is the value at 0 of a random polynomial of degree ``threshold - 1`` over the prime field p = 2^256 + 297, and
a share is its value at x. p is the smallest prime above 2^256, so that every 32-byte string is a secret; a share takes
33 bytes, big endian. The shares are a Reed-Solomon code, which is how ``recover`` finds the wrong ones.

Python's integers do not compute in constant time: this does not hold against an attacker who measures microseconds.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, combinations, islice, pairwise, repeat, zip_longest
from typing import Final

import numpy as np

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33
#: Highest x of a share.
MAX_X: Final = 2**16
#: Most positions that ``recover`` guesses at: 2 of 90 are 4005, the most that 3 wrong ones among threshold + 4 of 128
#: holders ask for.
MAX_GUESSES: Final = 4096


_PARITY_BYTES: Final = 16
#: Steps of Horner's rule between remainders: by then a number has grown by 256 bits at most.
_STEPS: Final = 16


class UnrecoverableError(ValueError):
    """No set of shares gives the right secret within the bounded search."""


@dataclass(frozen=True)
class Recovered:
    """A secret, and the xs whose shares are not on its polynomial, in rising order."""

    secret: bytes = field(repr=False)
    wrong: tuple[int, ...]


def split(secret: bytes, threshold: int, xs: Sequence[int]) -> dict[int, bytes]:
    """Share a secret so that any ``threshold`` of the shares give it, and fewer tell nothing.

    Args:
        secret: 32 bytes.
        threshold: shares that are needed, 1 to ``len(xs)``.
        xs: where the shares lie, distinct, 1 to 2^16.

    Returns:
        A share of 33 bytes for each x.

    Raises:
        ValueError: an argument is out of its range.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"secret: must be {SECRET_BYTES} bytes, got {len(secret)}")
    if len(set(xs)) != len(xs):
        raise ValueError("xs: must be distinct, got one twice")
    _require_threshold(threshold, len(xs))
    for x in xs:
        _require_x(x)
    # Highest power first, as Horner's rule wants them.
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    return {x: _value(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in xs}


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from the ``threshold`` shares with the smallest xs.

    Raises:
        ValueError: too few shares, a malformed one, or they give no 32-byte secret.
    """
    _require_threshold(threshold, len(shares))
    xs = tuple(sorted(shares)[:threshold])
    secret = _at_zero(xs, [_parse(x, shares[x]) for x in xs])
    if secret is None:
        raise ValueError(f"shares: must give a secret of {SECRET_BYTES} bytes, got a larger value")
    return secret


def recover(
    shares: Mapping[int, bytes], threshold: int, is_right: Callable[[bytes], bool]
) -> Recovered:
    """The secret even where shares are wrong, and whose they are.

    Looks for the polynomial with the fewest wrong shares whose value at 0 is right: up to half the spare shares without
    any guess (Berlekamp-Massey on the code's syndromes), more by guessing positions, a bounded number in a fixed order.
    Three wrong ones among threshold + 4 are always found for up to 128 holders.

    Whom it names is certain while no more than half of the spare shares are wrong. Beyond that, holders who collude can
    send shares that leave the secret right and put the blame on others; no decoder can tell.

    Args:
        shares: 33 bytes for each x; those that are malformed count as wrong.
        threshold: of ``split``.
        is_right: whether a candidate of 32 bytes is the secret, for instance by its public key.

    Raises:
        ValueError: the threshold or an x is out of range.
        UnrecoverableError: too few shares, or no right secret was found.
    """
    points: dict[int, int] = {}
    malformed = set()
    for x in sorted(shares):
        try:
            points[x] = _parse(x, shares[x])
        except _MalformedError:
            malformed.add(x)
    if threshold < 1:
        raise ValueError(f"threshold: must be at least 1, got {threshold}")
    if len(points) < threshold:
        raise UnrecoverableError(f"shares: must be {threshold} well-formed ones, got {len(points)}")
    xs, values = tuple(points), list(points.values())
    # All shares give the secret as the first ones do, if they are right, and need the same numbers as the check below.
    whole = _at_zero(xs, values)
    if whole is not None and is_right(whole) and _is_consistent(xs, values, threshold):
        return Recovered(whole, tuple(sorted(malformed)))
    for wrong in _candidates(xs, values, threshold):
        good = tuple(x for x in xs if x not in wrong)[:threshold]
        secret = _at_zero(good, [points[x] for x in good])
        if secret is not None and is_right(secret):
            return Recovered(secret, tuple(sorted(malformed | _off(points, good))))
    first = _at_zero(xs[:threshold], values[:threshold])
    if first is not None and is_right(first):
        return Recovered(first, tuple(sorted(malformed | _off(points, xs[:threshold]))))
    raise UnrecoverableError(
        f"shares: must hold {threshold} right ones that can be found, got {len(shares)} shares"
    )


class _MalformedError(ValueError):
    """A share is not one number of the field in 33 bytes."""


def _require_threshold(threshold: int, shares: int) -> None:
    if threshold < 1 or threshold > shares:
        raise ValueError(f"threshold: must be 1 to the {shares} shares, got {threshold}")


def _require_x(x: int) -> None:
    if type(x) is not int or not 1 <= x <= MAX_X:
        raise ValueError(f"x: must be 1 to {MAX_X}, got {x}")


def _parse(x: int, share: bytes) -> int:
    _require_x(x)
    if len(share) != SHARE_BYTES:
        raise _MalformedError(f"share of {x}: must be {SHARE_BYTES} bytes, got {len(share)}")
    value = int.from_bytes(share, "big")
    if value >= PRIME:
        raise _MalformedError(f"share of {x}: must be below the field's prime, got a larger value")
    return value


def _at_zero(xs: tuple[int, ...], values: Sequence[int]) -> bytes | None:
    """The polynomial's value at 0; None where it is no secret, which honest shares never give."""
    value = sum(w * v for w, v in zip(_weights(xs), values, strict=True)) % PRIME
    return value.to_bytes(SECRET_BYTES, "big") if value < 2**256 else None


@lru_cache(maxsize=512)
def _weights(xs: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0: the product of all x_j but x_i, by all x_j - x_i."""
    product = math.prod(xs)
    return tuple(product // x * v % PRIME for x, v in zip(xs, _dual(xs), strict=True))


def _value(coefficients: Sequence[int], x: int) -> int:
    """A polynomial at x, highest power first."""
    value = 0
    for start in range(0, len(coefficients), _STEPS):
        for coefficient in coefficients[start : start + _STEPS]:
            value = value * x + coefficient
        value %= PRIME
    return value


def _distances(xs: Sequence[int]) -> list[int]:
    """For each x_i the product of all x_j - x_i, which are small: three at a time fit into 64 bits."""
    at = np.array(xs, np.int64)
    apart = np.ones((len(xs), -(-len(xs) // 3) * 3), np.int64)
    apart[:, : len(xs)] = at - at[:, None]
    np.fill_diagonal(apart, 1)
    products: list[list[int]] = apart.reshape(len(xs), -1, 3).prod(axis=2).tolist()
    return [math.prod(row) % PRIME for row in products]


def _inverses(values: Sequence[int]) -> list[int]:
    """All inverses for the price of one (Montgomery's trick); no value may be 0."""
    before, product = [], 1
    for value in values:
        before.append(product)
        product = product * value % PRIME
    inverse = pow(product, -1, PRIME)
    found = []
    for value, earlier in zip(reversed(values), reversed(before), strict=True):
        found.append(inverse * earlier % PRIME)
        inverse = inverse * value % PRIME
    return found[::-1]


@lru_cache(maxsize=128)
def _dual(xs: tuple[int, ...]) -> tuple[int, ...]:
    """Multipliers v_i: the sum of v_i x_i^k y_i is 0 for all k below the spare shares, where no share is wrong."""
    return tuple(_inverses(_distances(xs)))


@lru_cache(maxsize=128)
def _parity(xs: tuple[int, ...], threshold: int) -> tuple[int, ...]:
    """One random combination of all parity checks, so that one sum tells whether every share fits."""
    spare = len(xs) - threshold
    drawn = secrets.token_bytes(_PARITY_BYTES * spare)
    factors = [
        int.from_bytes(drawn[i * _PARITY_BYTES : (i + 1) * _PARITY_BYTES], "big")
        for i in range(spare)
    ]
    return tuple(_value(factors, x) * v % PRIME for x, v in zip(xs, _dual(xs), strict=True))


def _is_consistent(xs: tuple[int, ...], values: Sequence[int], threshold: int) -> bool:
    """Whether all shares lie on one polynomial; mistaken once in 2^128."""
    if len(xs) == threshold:
        return True
    return sum(c * v for c, v in zip(_parity(xs, threshold), values, strict=True)) % PRIME == 0


def _candidates(
    xs: tuple[int, ...], values: Sequence[int], threshold: int
) -> Iterator[frozenset[int]]:
    """Sets of wrong xs which leave the rest on one polynomial, small sets first."""
    spare = len(xs) - threshold
    syndromes = []
    terms = [m * v % PRIME for m, v in zip(_dual(xs), values, strict=True)]
    for _ in range(spare):
        syndromes.append(sum(terms) % PRIME)
        terms = [term * x % PRIME for term, x in zip(terms, xs, strict=True)]
    # A guess costs spare² steps: with many spare shares fewer are tried, or liars could stall the server for minutes.
    allowed = max(len(xs), 16 * MAX_GUESSES // max(16, spare * spare))
    guesses = 0
    # Each position that is guessed costs one syndrome; what remains locates half its number.
    for guessed in _by_reach(spare):
        for guess in combinations(xs, guessed):
            guesses += 1
            if guesses > allowed:
                return
            rest = syndromes
            for x in guess:
                rest = [(b - x * a) % PRIME for a, b in pairwise(rest)]
            located = _locate(rest, xs)
            if located is not None:
                yield located.union(guess)


def _by_reach(spare: int) -> Iterator[int]:
    """Numbers of positions to guess, each the fewest that reach one more wrong share."""
    reach = -1
    for guessed in range(spare + 1):
        if guessed + (spare - guessed) // 2 > reach:
            reach = guessed + (spare - guessed) // 2
            yield guessed


def _locate(syndromes: Sequence[int], xs: Sequence[int]) -> frozenset[int] | None:
    """The xs of the wrong shares, half as many as syndromes at most, or None (Berlekamp-Massey, no division)."""
    current, previous = [1], [1]
    length, shift, last = 0, 1, 1
    for n in range(len(syndromes)):
        discrepancy = sum(c * syndromes[n - i] for i, c in enumerate(current) if i <= n) % PRIME
        if discrepancy == 0:
            shift += 1
            continue
        pairs = zip_longest(current, [0] * shift + previous, fillvalue=0)
        updated = [(last * a - discrepancy * b) % PRIME for a, b in pairs]
        if 2 * length <= n:
            length, previous, last, shift = n + 1 - length, current, discrepancy, 1
        else:
            shift += 1
        current = updated
    if 2 * length > len(syndromes):
        return None
    coefficients = list(islice(chain(current, repeat(0)), length + 1))
    roots = {x for x in xs if _value(coefficients, x) == 0}
    return frozenset(roots) if len(roots) == length else None


def _off(points: Mapping[int, int], good: tuple[int, ...]) -> set[int]:
    """The xs whose share is off the polynomial through ``good``."""
    wrong = set()
    for x in points.keys() - set(good):
        # The value at 0 of the polynomial moved by x.
        nodes = tuple(g - x for g in good)
        value = sum(w * points[g] for w, g in zip(_weights.__wrapped__(nodes), good, strict=True))
        if value % PRIME != points[x]:
            wrong.add(x)
    return wrong
