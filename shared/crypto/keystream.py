"""AES-256 in counter mode: the keystream of masks and of cryptographic randomness."""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.ciphers import (
    AEADEncryptionContext,
    Cipher,
    algorithms,
    modes,
)

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12


def keystream(key: bytes, part: int = 0) -> AEADEncryptionContext:
    """An encryptor that makes the keystream of a part out of zeros, piece after piece.

    Raises:
        ValueError: the key is not 32 bytes.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"key: must be {KEY_BYTES} bytes, got {len(key)}")
    nonce = part.to_bytes(_NONCE_BYTES, "little")
    return Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
