"""Masks: AES-256-CTR keystreams, added to a vector over the ring 2^32.

The keystream (NIST SP 800-38A, 6.5) is the encryption of the blocks 2, 3, 4 ... as 128-bit numbers, read as
little-endian uint32. Each key makes one keystream only, so all may start at the same block. It is block 2 because GCM
(SP 800-38D) under a zero nonce starts there, and OpenSSL runs GCM's counter on the processor's widest AES units but not
CTR's: 10 GB/s against 5 on the machine where this was written. No tag is computed; nothing here authenticates.

A vector has at most ``MAX_VALUES``, 2^28 blocks: far from 2^32, where GCM's counter would wrap, and farther from
2^64, where a keystream could be told from random.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import (
    AEADEncryptionContext,
    Cipher,
    algorithms,
    modes,
)
from numpy.typing import NDArray

KEY_BYTES: Final = 32
#: Longest vector, in values of 4 bytes.
MAX_VALUES: Final = 2**30
#: Bytes that are made and added at a time: the slowest parts then stay in a core's cache.
CHUNK_BYTES: Final = 128 * 1024

_VALUE_BYTES: Final = 4
#: Some ciphers want room for one block more than they write.
_BLOCK_BYTES: Final = 16
_NONCE_BYTES: Final = 12
# At a time: far below what a C integer holds.
_HASHED_BYTES: Final = 2**24
#: Values that are hashed and then added from the cache.
_ADDED: Final = 2**17


def keystream(key: bytes) -> AEADEncryptionContext:
    """An encryptor that makes the keystream out of zeros, piece after piece.

    Raises:
        ValueError: the key is not 32 bytes.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"key: must be {KEY_BYTES} bytes, got {len(key)}")
    return Cipher(algorithms.AES(key), modes.GCM(bytes(_NONCE_BYTES))).encryptor()


def add_masks(
    vector: NDArray[np.uint32], masks: Sequence[tuple[bytes, int]], chunk: int = CHUNK_BYTES
) -> None:
    """Add or subtract keystreams in place, modulo 2^32.

    All masks of a chunk come before the next chunk, so that the vector moves through memory once.

    Args:
        vector: one-dimensional, contiguous, little-endian uint32, up to ``MAX_VALUES``.
        masks: a 32-byte key each, and +1 to add its keystream or -1 to subtract it.
        chunk: bytes at a time, a multiple of 16.

    Raises:
        ValueError: an argument is not so; the vector is unchanged.
    """
    _require_vector(vector)
    if not vector.flags.writeable:
        raise ValueError("vector: must be writeable, got a read-only one")
    if chunk < _BLOCK_BYTES or chunk % _BLOCK_BYTES:
        raise ValueError(f"chunk: must be a multiple of {_BLOCK_BYTES}, got {chunk}")
    if any(sign not in (1, -1) for _, sign in masks):
        raise ValueError("masks: must have the sign 1 or -1, got another")
    streams = [
        (keystream(key).update_into, np.add if sign == 1 else np.subtract) for key, sign in masks
    ]
    step = chunk // _VALUE_BYTES
    zeros = memoryview(bytes(chunk))
    made = np.empty(step + _BLOCK_BYTES // _VALUE_BYTES, np.uint32)
    room = made.view(np.uint8).data
    for start in range(0, vector.size, step):
        part = vector[start : start + step]
        source = zeros[: part.nbytes]
        values = made[: part.size]
        for update_into, operation in streams:
            update_into(source, room)
            operation(part, values, out=part)
    made.fill(0)


def checksum(vector: NDArray[np.uint32]) -> int:
    """64 bits that differ where a value was changed or moved, against damage on the way; they keep no attacker off.

    It is half of a GCM tag (GHASH) under a key of zeros, which everybody has: the processor computes it faster than
    sums that depend on the position. Damage escapes about once in 2^64.

    Raises:
        ValueError: the vector is not one-dimensional, contiguous, little-endian uint32.
    """
    _require_vector(vector)
    hasher = keystream(bytes(KEY_BYTES))
    data = vector.view(np.uint8).data
    for start in range(0, len(data), _HASHED_BYTES):
        hasher.authenticate_additional_data(data[start : start + _HASHED_BYTES])
    hasher.finalize()
    return int.from_bytes(hasher.tag[:8], "big")


def add_vector(total: NDArray[np.uint32], vector: NDArray[np.uint32]) -> int:
    """Add a vector to a sum in place, modulo 2^32; each piece is hashed on the way, while it is in the cache.

    Args:
        total: one-dimensional, contiguous, little-endian uint32, up to ``MAX_VALUES``.
        vector: the same, as long.

    Returns:
        ``checksum(vector)``.

    Raises:
        ValueError: an argument is not so; the sum is unchanged.
    """
    _require_vector(total)
    _require_vector(vector)
    if total.size != vector.size:
        raise ValueError(f"vector: must be {total.size} values as the sum, got {vector.size}")
    if not total.flags.writeable:
        raise ValueError("sum: must be writeable, got a read-only one")
    hasher = keystream(bytes(KEY_BYTES))
    for start in range(0, total.size, _ADDED):
        part, values = total[start : start + _ADDED], vector[start : start + _ADDED]
        hasher.authenticate_additional_data(values.view(np.uint8).data)
        np.add(part, values, out=part)
    hasher.finalize()
    return int.from_bytes(hasher.tag[:8], "big")


def _require_vector(vector: NDArray[np.uint32]) -> None:
    if vector.ndim != 1 or vector.dtype != np.dtype("<u4") or not vector.flags.c_contiguous:
        raise ValueError(
            "vector: must be one-dimensional, contiguous, little-endian uint32, "
            f"got {vector.ndim}-dimensional {vector.dtype.str}"
        )
    if sys.byteorder != "little":
        raise ValueError("this machine: must be little-endian, got big-endian")
    if vector.size > MAX_VALUES:
        raise ValueError(f"vector: must be up to {MAX_VALUES} values, got {vector.size}")
