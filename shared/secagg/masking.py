"""Masks: AES-256-CTR keystreams, added to a vector whose values are in the ring 2^32 and its counters in 2^128.

Values are masked in parts of ``PART``, which threads can take apart: part i by the keystream of part i
(``fedge.shared.crypto.keystream``), read as little-endian uint32. The counters after them are one part more, read as
little-endian numbers of 128 bits: each is one element of its ring, so that a sum tells nothing of how it came about.
Each key makes one keystream only, so parts can be numbered from 0. Masks authenticate nothing.

A vector has at most ``MAX_VALUES``, 2^28 blocks: far from 2^64, where a keystream could be told from random.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedge.shared.crypto.keystream import KEY_BYTES, gcm, keystream
from fedge.shared.secagg import parallel

#: Longest vector, in values of 4 bytes.
MAX_VALUES: Final = 2**30
#: Values of a part, 2 MiB.
PART: Final = 2**19
#: Bytes that are made and added at a time: the slowest parts then stay in a core's cache.
CHUNK_BYTES: Final = 128 * 1024
#: The same for several threads, which wait for each other between the pieces.
SHARED_CHUNK_BYTES: Final = 512 * 1024

_VALUE_BYTES: Final = 4
#: Words of 4 bytes of a counter, 128 bits.
_COUNTER_WORDS: Final = 4
#: Some ciphers want room for one block more than they write.
_BLOCK_BYTES: Final = 16
_NOTHING: Final = bytes(SHARED_CHUNK_BYTES)
_HUGE_PAGE: Final = 2**21
_OPEN_KEY: Final = bytes(KEY_BYTES)
#: Values that are hashed and then added from the cache.
_ADDED: Final = 2**17


class Shape(NamedTuple):
    """How many elements of each ring a vector has.

    Attributes:
        values: of 2^32.
        counters: of 2^128, after the values, each in the place of four.
    """

    values: int
    counters: int

    @property
    def length(self) -> int:
        """Words of 4 bytes."""
        return self.values + _COUNTER_WORDS * self.counters


def counters_in(vector: NDArray[np.uint32], counters: int) -> NDArray[np.uint64]:
    """A view of the counters at the end of a vector, perhaps not aligned.

    ``(counters, 2)`` little-endian uint64: the low half of each number, and the high one.
    """
    return vector[vector.size - _COUNTER_WORDS * counters :].view("<u8").reshape(-1, 2)


def add_counters(total: NDArray[np.uint64], counters: NDArray[np.uint64]) -> None:
    """Add numbers of 128 bits in place, modulo 2^128; both ``(n, 2)`` as of ``counters_in``."""
    total[:, 0] += counters[:, 0]
    total[:, 1] += counters[:, 1] + (total[:, 0] < counters[:, 0])


def subtract_counters(total: NDArray[np.uint64], counters: NDArray[np.uint64]) -> None:
    """The reverse of ``add_counters``."""
    borrowed = total[:, 0] < counters[:, 0]
    total[:, 0] -= counters[:, 0]
    total[:, 1] -= counters[:, 1] + borrowed


def add_masks(
    vector: NDArray[np.uint32],
    masks: Sequence[tuple[bytes, int]],
    chunk: int | None = None,
    *,
    counters: int = 0,
) -> None:
    """Add or subtract keystreams in place, modulo 2^32, and modulo 2^128 for the counters at the end.

    All masks of a chunk come before the next chunk, so that the vector moves through memory once.

    Args:
        vector: one-dimensional, contiguous, little-endian uint32, up to ``MAX_VALUES``.
        masks: a 32-byte key each, and +1 to add its keystream or -1 to subtract it.
        chunk: bytes at a time, a multiple of 16; as many as are fastest where not given.
        counters: how many there are at the end.

    Raises:
        ValueError: an argument is not so; the vector is unchanged.
    """
    values = _values(vector, counters)
    if not vector.flags.writeable:
        raise ValueError("vector: must be writeable, got a read-only one")
    if chunk is None:
        alone = parallel.threads() == 1 or _parts(values) == 1
        chunk = CHUNK_BYTES if alone else SHARED_CHUNK_BYTES
    if chunk < _BLOCK_BYTES or chunk % _BLOCK_BYTES:
        raise ValueError(f"chunk: must be a multiple of {_BLOCK_BYTES}, got {chunk}")
    if any(sign not in (1, -1) for _, sign in masks):
        raise ValueError("masks: must have the sign 1 or -1, got another")
    for key, _ in masks:
        keystream(key)
    step = min(chunk // _VALUE_BYTES, PART)
    size = step * _VALUE_BYTES
    nothing = memoryview(_NOTHING if size <= SHARED_CHUNK_BYTES else bytes(size))

    def add(parts: range) -> None:
        room = parallel.scratch(size + _BLOCK_BYTES)
        made = room.view(np.uint32)
        for part in parts:
            streams = [
                (keystream(key, part).update_into, np.add if sign == 1 else np.subtract)
                for key, sign in masks
            ]
            end = min((part + 1) * PART, values.size)
            for start in range(part * PART, end, step):
                piece = values[start : min(start + step, end)]
                source, stream = nothing[: piece.nbytes], made[: piece.size]
                for update_into, operation in streams:
                    update_into(source, room.data)
                    operation(piece, stream, out=piece)
        room.fill(0)

    parallel.each(_parts(values), add)
    if counters:
        tail = counters_in(vector, counters)
        for key, sign in masks:
            stream = keystream(key, _parts(values)).update(bytes(tail.nbytes))
            mask = np.frombuffer(stream, "<u8").reshape(-1, 2)
            (add_counters if sign == 1 else subtract_counters)(tail, mask)


def zeros(size: int) -> NDArray[np.uint32]:
    """A vector of zeros, to be added to, on huge pages where the kernel has them for who asks.

    Touching 1 000 small pages for the first time takes as long as adding three vectors of 10^6 values. NumPy asks for
    huge ones from 4 MiB on, and they start at multiples of 2 MiB.
    """
    wanted = size * _VALUE_BYTES
    if wanted < _HUGE_PAGE // 2:
        return np.zeros(size, np.uint32)
    raw = np.zeros(wanted + 2 * _HUGE_PAGE, np.uint8)
    start = -raw.ctypes.data % _HUGE_PAGE
    return raw[start : start + wanted].view(np.uint32)


def checksum(vector: NDArray[np.uint32]) -> int:
    """64 bits that differ where a value was changed or moved, against damage on the way; they keep no attacker off.

    Of each part it takes a GCM tag without encryption (GMAC: GHASH) under a key of zeros, which everybody has, and of
    those tags another: the processor computes that faster than sums that depend on the position. Damage escapes about
    once in 2^64. Unlike the keystream's mode it is not chosen by a measurement: both ends must compute the same, and of
    GHASH there is one implementation here.

    Raises:
        ValueError: the vector is not one-dimensional, contiguous, little-endian uint32.
    """
    _require_vector(vector)
    return _hashed([vector], None)[0]


def add_vectors(
    total: NDArray[np.uint32], vectors: Sequence[NDArray[np.uint32]], *, counters: int = 0
) -> list[int]:
    """Add vectors to a sum in place; each piece is hashed on the way, while it is in the cache.

    Values are added modulo 2^32, counters modulo 2^128.

    Args:
        total: one-dimensional, contiguous, little-endian uint32, up to ``MAX_VALUES``.
        vectors: the same, as long.
        counters: how many there are at the end.

    Returns:
        ``checksum`` of each vector.

    Raises:
        ValueError: an argument is not so; the sum is unchanged.
    """
    values = _values(total, counters)
    for vector in vectors:
        _require_vector(vector)
        if total.size != vector.size:
            raise ValueError(f"vector: must be {total.size} values as the sum, got {vector.size}")
    if not total.flags.writeable:
        raise ValueError("sum: must be writeable, got a read-only one")
    found = _hashed(vectors, values)
    if counters:
        tail = counters_in(total, counters)
        for vector in vectors:
            add_counters(tail, counters_in(vector, counters))
    return found


def subtract_vector(
    total: NDArray[np.uint32], vector: NDArray[np.uint32], *, counters: int = 0
) -> None:
    """Take a vector that ``add_vectors`` added off the sum again, in place."""
    values = _values(total, counters)
    np.subtract(values, vector[: values.size], out=values)
    subtract_counters(counters_in(total, counters), counters_in(vector, counters))


def _hashed(vectors: Sequence[NDArray[np.uint32]], total: NDArray[np.uint32] | None) -> list[int]:
    """The checksum of each vector; as much as the sum has is added to it, all of a piece before the next piece."""
    if not vectors:
        return []
    size = vectors[0].size
    tags = [[b""] * _parts(vectors[0]) for _ in vectors]

    def hash_and_add(parts: range) -> None:
        for part in parts:
            hashers = [gcm(_OPEN_KEY, part) for _ in vectors]
            end = min((part + 1) * PART, size)
            for start in range(part * PART, end, _ADDED):
                piece = slice(start, min(start + _ADDED, end))
                summed = total[piece] if total is not None else None
                for vector, hasher in zip(vectors, hashers, strict=True):
                    hasher.authenticate_additional_data(vector[piece].view(np.uint8).data)
                    if summed is not None:
                        np.add(summed, vector[start : start + summed.size], out=summed)
            for found, hasher in zip(tags, hashers, strict=True):
                hasher.finalize()
                found[part] = hasher.tag

    parallel.each(len(tags[0]), hash_and_add)
    return [_of_parts(found) for found in tags]


def _of_parts(tags: Sequence[bytes]) -> int:
    hasher = gcm(_OPEN_KEY)
    hasher.authenticate_additional_data(b"".join(tags))
    hasher.finalize()
    return int.from_bytes(hasher.tag[:8], "big")


def _values(vector: NDArray[np.uint32], counters: int) -> NDArray[np.uint32]:
    """A view of what is before the counters."""
    _require_vector(vector)
    if not 0 <= _COUNTER_WORDS * counters <= vector.size:
        raise ValueError(f"counters: must fit {vector.size} words, got {counters}")
    return vector[: vector.size - _COUNTER_WORDS * counters]


def _parts(vector: NDArray[np.uint32]) -> int:
    return -(-vector.size // PART)


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
