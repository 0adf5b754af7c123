"""Encrypted shares: what one site sends to another through the server, under AES-256-GCM (NIST SP 800-38D).

The nonce is zero. That is sound because a key encrypts one share only: it is derived from two X25519 keys that live
for one attempt, from the transcript of that attempt, and from the direction. A site must therefore encrypt
once and keep the result, not encrypt again when it is asked again.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedge.shared.errors import SiteError
from fedge.shared.secagg.key_agreement import KEY_BYTES, TRANSCRIPT_BYTES, framed

#: An encrypted share is so much longer than its content.
TAG_BYTES: Final = 16

_NONCE: Final = bytes(12)
_UNOPENED: Final = 425


def encrypt_share(key: bytes, plain: bytes, transcript: bytes, src: str, dst: str) -> bytes:
    """Encrypt and authenticate ``plain``, with T, sender and receiver as associated data.

    Args:
        key: 32 bytes of ``key_agreement.share_encryption_key``, used for no other share.
        plain: the content.
        transcript: T, 32 bytes.
        src: the sender's site id.
        dst: the receiver's.

    Returns:
        The ciphertext and its tag, 16 bytes longer than ``plain``.

    Raises:
        ValueError: a length is wrong.
    """
    return _cipher(key).encrypt(_NONCE, plain, _associated(transcript, src, dst))


def decrypt_share(
    key: bytes, encrypted_share: bytes, transcript: bytes, src: str, dst: str
) -> bytes:
    """Decrypt a share.

    Raises:
        SiteError: 425, the tag is wrong: the encrypted share was altered, or is for another round, sender or receiver.
        ValueError: the length of the key or of T is wrong.
    """
    try:
        return _cipher(key).decrypt(_NONCE, encrypted_share, _associated(transcript, src, dst))
    except InvalidTag:
        raise SiteError(
            _UNOPENED,
            f"{src}: its encrypted share for {dst} must carry a right tag, "
            f"got a wrong one ({len(encrypted_share)} bytes)",
        ) from None


def _cipher(key: bytes) -> AESGCM:
    if len(key) != KEY_BYTES:
        raise ValueError(f"key: must be {KEY_BYTES} bytes, got {len(key)}")
    return AESGCM(key)


def _associated(transcript: bytes, src: str, dst: str) -> bytes:
    if len(transcript) != TRANSCRIPT_BYTES:
        raise ValueError(f"transcript: must be {TRANSCRIPT_BYTES} bytes, got {len(transcript)}")
    return framed(transcript, src.encode(), dst.encode())
