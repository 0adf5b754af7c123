"""The five exchanges as Flower records: what is in each, its names and its bounds.

========  =======================  ==========================================  ==================================
exchange  message type             request, beside run, round and task         reply, beside site, run and round
========  =======================  ==========================================  ==================================
0         train, evaluate,         attempt, bounds, cap                        a signed key bundle
          evaluate.calibrate,
          evaluate.qualify,
          query.secagg_statistics
1         query.secagg_share       all bundles                                 commitment, sealed shares
2         query.secagg_masked      who shared, their shares for this site      the masked vector
3         query.secagg_commit      whose vectors arrived                       a signature on that list
4         query.secagg_unmask      the signatures of the others                one share a peer
========  =======================  ==========================================  ==================================

A site that finds fault with a peer, and not with the server, answers with the peer's name and a number instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedge.shared import protocol
from fedge.shared.secagg import transcript
from fedge.shared.secagg.transcript import HASH_BYTES, SIGNATURE_BYTES, KeyAdvertisement, Purpose

#: The record of the exchanges' values, in requests and replies.
SECURE: Final = "secagg"

STATISTICS: Final = "query.secagg_statistics"
SHARE: Final = "query.secagg_share"
MASKED: Final = "query.secagg_masked"
COMMIT: Final = "query.secagg_commit"
UNMASK: Final = "query.secagg_unmask"
#: The message type that begins a sum, by what is summed.
BEGIN: Final[Mapping[Purpose, str]] = {
    "statistics": STATISTICS,
    "train": protocol.TRAIN,
    "evaluate": protocol.EVALUATE,
    "calibrate": protocol.CALIBRATE,
    "qualify": protocol.QUALIFY,
}
#: Exchanges 1 to 4.
STEPS: Final = (SHARE, MASKED, COMMIT, UNMASK)

# Keys of SECURE.
PROTOCOL: Final = "version"
PURPOSE: Final = "purpose"
ATTEMPT: Final = "attempt"
MIN_SITES: Final = "min-sites"  # int, under distributed noise: fewest sites of a sum
CLIPPING_BOUND: Final = "clipping-bound"
VALUE_BOUND: Final = "value-bound"
STATE_BOUND: Final = "state-bound"
WEIGHT_CAP: Final = "weight-cap"
BUNDLE: Final = "bundle"
BUNDLES: Final = "bundles"
COMMITMENT: Final = "commitment"
ENCRYPTED_SHARES: Final = "boxes"
SHARERS: Final = "sharers"
SIGNATURE: Final = "signature"
SIGNATURES: Final = "signatures"
CHECKSUM: Final = "checksum"
SURVIVORS: Final = "survivors"
SHARES: Final = "shares"
BLAMED: Final = "blamed"
CODE: Final = "code"
VECTOR: Final = "masked"

SHARE_BYTES: Final = 33
#: Two shares and the tag of AES-GCM.
CIPHERTEXT_BYTES: Final = 2 * SHARE_BYTES + 16
#: What a peer is given of a site's two secrets: its shares, encrypted, and the SHA-256 of each in clear. By those
#: everybody can tell a share that its holder altered from one that was dealt so; of a random number of 256 bits a hash
#: tells nothing.
ENCRYPTED_SHARE_BYTES: Final = CIPHERTEXT_BYTES + 2 * HASH_BYTES


@dataclass(frozen=True)
class Sharer:
    """A site that has shared its secrets, as the others are told of it.

    Attributes:
        site: its name.
        commitment: SHA-256 of its self-mask seed.
        signature: of both and T, with its roster key.
        encrypted_share: its shares, encrypted for the receiver, and their hashes; empty for who holds none of them.
    """

    site: str
    commitment: bytes
    signature: bytes
    encrypted_share: bytes

    def encode(self) -> bytes:
        """As one text."""
        return self.encode_with(self.encrypted_share)

    def encode_with(self, encrypted_share: bytes) -> bytes:
        """As one text for the receiver of another encrypted share."""
        return (
            _head(self.site, self.commitment, self.signature)
            + bytes([len(encrypted_share)])
            + encrypted_share
        )


@dataclass(frozen=True)
class Signed:
    """A site's signature on the list of survivors."""

    site: str
    signature: bytes

    def encode(self) -> bytes:
        """As one text."""
        name = self.site.encode()
        return bytes([len(name)]) + name + self.signature


def record(values: Mapping[str, int | float | str | bytes]) -> ConfigRecord:
    """Values as the record of an exchange."""
    return ConfigRecord({**values})


def values_of(content: RecordDict) -> ConfigRecord:
    """The values of an exchange.

    Raises:
        ValueError: there are none.
    """
    found = content.get(SECURE)
    if not isinstance(found, ConfigRecord):
        raise ValueError(f"must hold a {SECURE} record, got none")
    return found


def data(values: ConfigRecord, key: str, most: int, least: int = 0) -> bytes:
    """A value that must be bytes.

    Raises:
        ValueError: it is missing, of another type, or not ``least`` to ``most`` long.
    """
    found = values.get(key)
    if not isinstance(found, bytes) or not least <= len(found) <= most:
        got = len(found) if isinstance(found, bytes) else type(found).__name__
        raise ValueError(f"{key}: must be {least} to {most} bytes, got {got}")
    return found


def integer(values: ConfigRecord, key: str, low: int, high: int) -> int:
    """A value that must be an integer from ``low`` to ``high``.

    Raises:
        ValueError: it is not.
    """
    found = values.get(key)
    if type(found) is not int or not low <= found <= high:
        raise ValueError(f"{key}: must be an integer from {low} to {high}, got {str(found)[:40]}")
    return found


def bundles_of(values: ConfigRecord) -> list[KeyAdvertisement]:
    """The bundles of exchange 1's request.

    Raises:
        ValueError: malformed, see ``transcript.unpack_advertisements``.
    """
    return transcript.unpack_advertisements(data(values, BUNDLES, protocol.MAX_SITES * 256))


def sharers_of(values: ConfigRecord) -> list[Sharer]:
    """The sharers of exchange 2's request, sorted.

    Raises:
        ValueError: malformed.
    """
    raw = data(values, SHARERS, protocol.MAX_SITES * 320)
    found: list[Sharer] = []
    at = 0
    while at < len(raw):
        name, at = _name(raw, at)
        commitment, at = _cut(raw, at, HASH_BYTES)
        signature, at = _cut(raw, at, SIGNATURE_BYTES)
        size, at = _cut(raw, at, 1)
        encrypted_share, at = _cut(raw, at, size[0])
        if len(encrypted_share) not in (0, ENCRYPTED_SHARE_BYTES):
            raise ValueError(
                f"encrypted share: must be {ENCRYPTED_SHARE_BYTES} bytes or none, "
                f"got {len(encrypted_share)}"
            )
        found.append(Sharer(name, commitment, signature, encrypted_share))
    transcript.require_names([s.site for s in found])
    return found


def signatures_of(values: ConfigRecord) -> list[Signed]:
    """The signatures of exchange 4's request, sorted by site.

    Raises:
        ValueError: malformed.
    """
    raw = data(values, SIGNATURES, protocol.MAX_SITES * 256)
    found: list[Signed] = []
    at = 0
    while at < len(raw):
        name, at = _name(raw, at)
        signature, at = _cut(raw, at, SIGNATURE_BYTES)
        found.append(Signed(name, signature))
    transcript.require_names([s.site for s in found])
    return found


def joined(items: Sequence[KeyAdvertisement | Sharer | Signed]) -> bytes:
    """Items one after the other."""
    return b"".join(item.encode() for item in items)


def vector_record(vector: NDArray[np.uint32]) -> ArrayRecord:
    """A masked vector as Flower's record; four bytes a value."""
    raw = vector.astype("<u4", copy=False)
    return ArrayRecord(
        {VECTOR: Array(dtype="uint32", shape=raw.shape, stype="raw", data=raw.tobytes())}
    )


@lru_cache(maxsize=protocol.MAX_SITES)
def _head(site: str, commitment: bytes, signature: bytes) -> bytes:
    """What of a sharer is the same for every reader."""
    name = site.encode()
    return bytes([len(name)]) + name + commitment + signature


def _name(raw: bytes, at: int) -> tuple[str, int]:
    size, at = _cut(raw, at, 1)
    name, at = _cut(raw, at, size[0])
    return name.decode("ascii", errors="replace"), at


def _cut(raw: bytes, at: int, size: int) -> tuple[bytes, int]:
    if at + size > len(raw):
        raise ValueError(f"must hold {at + size} bytes or more, got {len(raw)}")
    return raw[at : at + size], at + size
