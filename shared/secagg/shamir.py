"""Shamir's secret sharing of 32-byte secrets (Shamir, CACM 1979).

A secret is the value at 0 of a random polynomial of degree ``threshold - 1`` over the prime field p = 2^256 + 297, and
a share is its value at x. p is the smallest prime above 2^256, so that every 32-byte string is a secret; a share takes
33 bytes, big endian. Which shares are right is not decided here: their dealer gives the hash of each.

Python's integers do not compute in constant time: this does not hold against an attacker who measures microseconds.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

import numpy as np

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33
#: Highest x of a share.
MAX_X: Final = 2**16

#: Steps of Horner's rule between remainders: by then a number has grown by 256 bits at most.
_STEPS: Final = 16


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


def _require_threshold(threshold: int, shares: int) -> None:
    if threshold < 1 or threshold > shares:
        raise ValueError(f"threshold: must be 1 to the {shares} shares, got {threshold}")


def _require_x(x: int) -> None:
    if type(x) is not int or not 1 <= x <= MAX_X:
        raise ValueError(f"x: must be 1 to {MAX_X}, got {x}")


def _parse(x: int, share: bytes) -> int:
    _require_x(x)
    if len(share) != SHARE_BYTES:
        raise ValueError(f"share of {x}: must be {SHARE_BYTES} bytes, got {len(share)}")
    value = int.from_bytes(share, "big")
    if value >= PRIME:
        raise ValueError(f"share of {x}: must be below the field's prime, got a larger value")
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
    """Of Lagrange's weights: one by the product of all x_j - x_i."""
    return tuple(_inverses(_distances(xs)))
