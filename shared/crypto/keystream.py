"""AES-256 in counter mode: the keystream of masks and of cryptographic randomness.

The keystream of part i (NIST SP 800-38A, 6.5) is the encryption of a nonce, i in 12 bytes, little-endian, followed by a
counter from 2 on, 4 bytes, big-endian. AES-256-GCM (SP 800-38D) encrypts zeros to the same bytes. OpenSSL runs one of
the two on wider AES units than the other, and which one depends on the processor: both are measured, at the first use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Final

from cryptography.hazmat.primitives.ciphers import (
    AEADEncryptionContext,
    Cipher,
    CipherContext,
    algorithms,
    modes,
)

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_FIRST: Final = (2).to_bytes(4, "big")
#: What is measured: so many bytes so many times, under a millisecond in all; the fastest of each counts.
_MEASURED_BYTES, _TIMES = 128 * 1024, 5


def gcm(key: bytes, part: int = 0) -> AEADEncryptionContext:
    """AES-256-GCM of a part: its encryptor, which can authenticate too.

    Raises:
        ValueError: the key is not 32 bytes.
    """
    _require(key)
    return Cipher(algorithms.AES(key), modes.GCM(_nonce(part))).encryptor()


def ctr(key: bytes, part: int = 0) -> CipherContext:
    """AES-256-CTR of a part: its encryptor.

    Raises:
        ValueError: the key is not 32 bytes.
    """
    _require(key)
    return Cipher(algorithms.AES(key), modes.CTR(_nonce(part) + _FIRST)).encryptor()


def keystream(key: bytes, part: int = 0) -> CipherContext:
    """An encryptor that makes the keystream of a part out of zeros, piece after piece.

    The modes agree for 16 * (2^32 - 2) bytes, where GCM's counter begins again; no part and no stream here is as long.

    Raises:
        ValueError: the key is not 32 bytes.
    """
    return fastest()(key, part)


@cache
def rates() -> dict[str, float]:
    """Bytes per second of each mode on this processor, by its name here."""
    zeros = bytes(_MEASURED_BYTES)
    # Some ciphers want room for one block more than they write.
    room = bytearray(_MEASURED_BYTES + 16)
    seconds = dict.fromkeys(_MODES, float("inf"))
    for _ in range(_TIMES):
        for name, mode in _MODES.items():
            encryptor = mode(bytes(KEY_BYTES), 0)
            began = time.perf_counter()
            encryptor.update_into(zeros, room)
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return {name: _MEASURED_BYTES / max(least, 1e-9) for name, least in seconds.items()}


@cache
def fastest() -> Callable[[bytes, int], CipherContext]:
    """The mode that makes keystreams here."""
    measured = rates()
    return _MODES[max(measured, key=measured.__getitem__)]


def _nonce(part: int) -> bytes:
    return part.to_bytes(_NONCE_BYTES, "little")


def _require(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(f"key: must be {KEY_BYTES} bytes, got {len(key)}")


_MODES: Final[dict[str, Callable[[bytes, int], CipherContext]]] = {"gcm": gcm, "ctr": ctr}
