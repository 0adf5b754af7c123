"""What sites sign, and the transcript T that every key, box and signature of an attempt is bound to.

T is the SHA-256 over a domain string, the protocol's version, the request digest, the run, the purpose, the round, the
attempt and all key advertisements. So two sites that were shown different models, settings or peers have different T,
and nothing of the one verifies or opens at the other. Every part is preceded by its length: no two contents have the
same encoding.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedge.shared.protocol import MAX_SITES, SITE_NAME
from fedge.shared.secagg.key_agreement import framed

Purpose: TypeAlias = Literal["statistics", "train", "evaluate", "calibrate", "qualify"]

#: Of the protocol; a site serves only its own.
VERSION: Final = 2
#: Fewest sites of which a sum hides one; and the most that exact counters can add up.
MIN_SITES: Final = 3
KEY_BYTES, SIGNATURE_BYTES, HASH_BYTES = 32, 64, 32

_DOMAIN: Final = b"fedge secure aggregation"
_SITE: Final = re.compile(SITE_NAME)


@dataclass(frozen=True)
class Attempt:
    """Which try of which sum.

    Attributes:
        request_digest: SHA-256 of all that the sites were asked to do, the same for all of them.
        run_id: fedge's run.
        purpose: what is summed.
        server_round: of the run, 0 for statistics.
        number: of the try, from 1; each has keys of its own.
    """

    request_digest: bytes
    run_id: str
    purpose: Purpose
    server_round: int
    number: int

    def encode(self) -> bytes:
        """As it is signed and hashed."""
        numbers = f"{VERSION} {self.purpose} {self.server_round} {self.number}".encode()
        return framed(_DOMAIN, numbers, self.run_id.encode(), self.request_digest)


@dataclass(frozen=True)
class KeyAdvertisement:
    """A site's two ephemeral X25519 public keys of an attempt, signed with its roster key.

    Attributes:
        site: its name.
        encryption_key: peers seal shares to it.
        mask_key: masks are agreed with it; its private half is what peers hold shares of.
        signature: Ed25519, over attempt, site and keys.
    """

    site: str
    encryption_key: bytes
    mask_key: bytes
    signature: bytes

    def encode(self) -> bytes:
        """Name and keys as one text; at most 193 bytes."""
        name = self.site.encode()
        return bytes([len(name)]) + name + self.encryption_key + self.mask_key + self.signature


def new_advertisement(
    attempt: Attempt, site: str, encryption_key: bytes, mask_key: bytes, private: Ed25519PrivateKey
) -> KeyAdvertisement:
    """A signed bundle."""
    signature = private.sign(_advertisement_statement(attempt, site, encryption_key, mask_key))
    return KeyAdvertisement(site, encryption_key, mask_key, signature)


def verifies(attempt: Attempt, bundle: KeyAdvertisement, key: Ed25519PublicKey) -> bool:
    """Whether a bundle is of this attempt and signed with this key."""
    statement = _advertisement_statement(
        attempt, bundle.site, bundle.encryption_key, bundle.mask_key
    )
    return is_signed(key, bundle.signature, statement)


def is_signed(key: Ed25519PublicKey, signature: bytes, statement: bytes) -> bool:
    """Whether a statement carries this key's signature."""
    try:
        key.verify(signature, statement)
    except InvalidSignature:
        return False
    return True


def transcript(attempt: Attempt, bundles: Sequence[KeyAdvertisement]) -> bytes:
    """T, 32 bytes.

    Args:
        attempt: of the bundles.
        bundles: of all sites, sorted by site.
    """
    return hashlib.sha256(
        framed(b"transcript", attempt.encode(), *(b.encode() for b in bundles))
    ).digest()


def share_statement(t: bytes, site: str, commitment: bytes) -> bytes:
    """What a site signs with its shares: that it holds this T, and SHA-256(b) of its self-mask seed."""
    return framed(_DOMAIN, b"share", t, site.encode(), commitment)


def masked_statement(t: bytes, site: str, peers: bytes, length: int, checksum: int) -> bytes:
    """What a site signs with its masked vector: with whom it masked, and the vector's length and checksum.

    The checksum finds damage. It does not resist an attacker, who can find other vectors with the same one, so that the
    signature proves nothing of the vector; and the server, which could alter it, may as well ignore the checksum.
    """
    size = length.to_bytes(8, "big") + checksum.to_bytes(8, "big")
    return framed(_DOMAIN, b"masked", t, site.encode(), peers, size)


def commit_statement(t: bytes, peers: bytes, survivors: bytes) -> bytes:
    """What a site signs of the survivors: the same bytes at every site, or too few signatures agree."""
    return framed(_DOMAIN, b"commit", t, peers, survivors)


def digest_of(sites: Iterable[str]) -> bytes:
    """SHA-256 of a set of sites, in sorted order."""
    return hashlib.sha256(framed(b"sites", *(s.encode() for s in sorted(sites)))).digest()


def pack_sites(sites: Iterable[str]) -> bytes:
    """Names on one line, sorted."""
    return ",".join(sorted(sites)).encode()


def unpack_sites(data: bytes) -> list[str]:
    """What ``pack_sites`` wrote.

    Raises:
        ValueError: too many, not sorted, twice, or not a name.
    """
    if len(data) > MAX_SITES * 65:
        raise ValueError(f"must name at most {MAX_SITES} sites, got {len(data)} bytes")
    names = data.decode("ascii", errors="replace").split(",") if data else []
    return require_names(names)


def require_names(names: list[str]) -> list[str]:
    """The names themselves.

    Raises:
        ValueError: too many, not sorted, twice, or not a name.
    """
    if len(names) > MAX_SITES:
        raise ValueError(f"must name at most {MAX_SITES} sites, got {len(names)}")
    if any(_SITE.fullmatch(name) is None for name in names):
        raise ValueError("must be names of sites, got another text")
    if any(a >= b for a, b in itertools.pairwise(names)):
        raise ValueError("must be sorted and without duplicates, got others")
    return names


def unpack_advertisements(data: bytes) -> list[KeyAdvertisement]:
    """Bundles one after the other, sorted by site.

    Raises:
        ValueError: cut short, too many, not sorted, a site twice, or a name that is none.
    """
    found: list[KeyAdvertisement] = []
    at = 0
    while at < len(data):
        if len(found) == MAX_SITES:
            raise ValueError(f"must be at most {MAX_SITES} bundles, got more")
        name_end = at + 1 + data[at]
        end = name_end + 2 * KEY_BYTES + SIGNATURE_BYTES
        if end > len(data):
            raise ValueError("must be whole bundles, got a part of one")
        keys = data[name_end : name_end + 2 * KEY_BYTES]
        found.append(
            KeyAdvertisement(
                data[at + 1 : name_end].decode("ascii", errors="replace"),
                keys[:KEY_BYTES],
                keys[KEY_BYTES:],
                data[end - SIGNATURE_BYTES : end],
            )
        )
        at = end
    require_names([b.site for b in found])
    return found


def _advertisement_statement(
    attempt: Attempt, site: str, encryption_key: bytes, mask_key: bytes
) -> bytes:
    return framed(_DOMAIN, b"bundle", attempt.encode(), site.encode(), encryption_key, mask_key)
