"""Keys between two sites: X25519 (RFC 7748), then HKDF-SHA256 (RFC 5869) for each purpose.

The salt of every derivation is the round's transcript T, and its info names the purpose and the sites, each part with
its length in front, so that no two purposes, rounds or pairs ever share a key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES: Final = 32
TRANSCRIPT_BYTES: Final = 32

_SHARE_ENCRYPTION: Final = b"fedge secure aggregation 1: box"
_MASK: Final = b"fedge secure aggregation 1: pair mask"
_SELF: Final = b"fedge secure aggregation 1: self mask"


@dataclass(frozen=True)
class Pair:
    """An ephemeral X25519 key: the private half, and the public one as 32 raw bytes."""

    private: X25519PrivateKey = field(repr=False)
    public: bytes

    @classmethod
    def generate(cls) -> Self:
        """A new random pair."""
        return cls._of(X25519PrivateKey.generate())

    @classmethod
    def from_private(cls, raw: bytes) -> Self:
        """The pair of a private key, for instance one that was recovered from its shares.

        Raises:
            ValueError: it is not 32 bytes.
        """
        _require(raw, "private key")
        return cls._of(X25519PrivateKey.from_private_bytes(raw))

    def private_bytes(self) -> bytes:
        """The private half as 32 bytes: what is shared among the holders."""
        return self.private.private_bytes_raw()

    @classmethod
    def _of(cls, private: X25519PrivateKey) -> Self:
        return cls(private, private.public_key().public_bytes_raw())


def shared(own: Pair, public: bytes) -> bytes:
    """The 32 bytes that only the two key holders know. They are no key yet; derive one.

    Args:
        own: one's own pair.
        public: the peer's, 32 bytes.

    Raises:
        ValueError: ``public`` is not 32 bytes, or a point of small order, whose result is all zero
            for every private key (RFC 7748, 6.1).
    """
    _require(public, "public key")
    try:
        return own.private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ValueError("public key: must not be a point of small order, got one") from None


def share_encryption_key(shared: bytes, transcript: bytes, src: str, dst: str) -> bytes:
    """The key of the one encrypted share from ``src`` to ``dst``; the way back has another.

    Args:
        shared: 32 bytes of ``shared``.
        transcript: T, 32 bytes.
        src: the sender's site id.
        dst: the receiver's.

    Returns:
        32 bytes for AES-256-GCM.

    Raises:
        ValueError: a length is wrong.
    """
    return _derive(shared, transcript, _SHARE_ENCRYPTION, src, dst)


def mask_key(shared: bytes, transcript: bytes, a: str, b: str) -> bytes:
    """The key of the mask that two sites share; the order of ``a`` and ``b`` does not matter.

    Returns:
        32 bytes for AES-256-CTR.

    Raises:
        ValueError: a length is wrong, or the two sites are one.
    """
    if a == b:
        raise ValueError(f"sites: must be two, got {a} twice")
    return _derive(shared, transcript, _MASK, *sorted((a, b)))


def self_mask_key(seed: bytes, transcript: bytes) -> bytes:
    """The key of a site's own mask, from its seed b of 32 bytes.

    Returns:
        32 bytes for AES-256-CTR.

    Raises:
        ValueError: a length is wrong.
    """
    return _derive(seed, transcript, _SELF)


def framed(*parts: bytes) -> bytes:
    """The parts, each after its length in four bytes: different parts never give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _derive(secret: bytes, transcript: bytes, purpose: bytes, *sites: str) -> bytes:
    _require(secret, "secret")
    if len(transcript) != TRANSCRIPT_BYTES:
        raise ValueError(f"transcript: must be {TRANSCRIPT_BYTES} bytes, got {len(transcript)}")
    info = framed(purpose, *(site.encode() for site in sites))
    return HKDF(SHA256(), KEY_BYTES, transcript, info).derive(secret)


def _require(data: bytes, key_name: str) -> None:
    if len(data) != KEY_BYTES:
        raise ValueError(f"{key_name}: must be {KEY_BYTES} bytes, got {len(data)}")
