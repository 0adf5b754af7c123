"""The roster: which sites a consortium has, and by which key each is known.

It is the trust anchor of secure aggregation. The consortium signs it, every site installs it, and a
server never sends it: a server that could name the keys could put its own in a site's place. A
draft is edited and signed; only what ``open_roster`` returns makes a site trusted, and the two have
different types for that reason.

Signed, it is a DSSE envelope (``fedge.shared.crypto.dsse``) around canonical JSON.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import date
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedge.shared.crypto import dsse
from fedge.shared.errors import BundleError, ConfigError, DeployError, SiteError, UsageError
from fedge.shared.roster.draft import (
    MAX_FILE,
    Draft,
    Listing,
    RosterSite,
    check_name,
    entry_of,
    iso_date,
    parts_of,
    tree_of,
)

PAYLOAD_TYPE: Final = "application/vnd.fedge.roster+json"

_NOT_TRUSTED: Final = 421
_UNUSABLE: Final = 917


@dataclass(frozen=True)
class Roster(Listing):
    """A roster that the consortium signed, as ``open_roster`` returns it."""

    @property
    def digest(self) -> str:
        """SHA-256 of the signed content, in hexadecimal."""
        return hashlib.sha256(content(self)).hexdigest()

    def key_of(self, site: str, today: date) -> Ed25519PublicKey:
        """The public key of a trusted site.

        Args:
            site: its name; it may come from the server.
            today: in UTC.

        Raises:
            SiteError: 421, the roster does not hold the site, or its entry is revoked or expired.
        """
        entry = self.sites.get(site)
        if entry is None:
            raise SiteError(_NOT_TRUSTED, f"site {site[:80]!r}: must be in the roster, got none")
        if entry.revoked:
            raise SiteError(_NOT_TRUSTED, f"site {site}: must be valid, got revoked by the roster")
        if today > entry.expires:
            raise SiteError(
                _NOT_TRUSTED,
                f"site {site}: must be valid on {today}, got one that expired after {entry.expires}",
            )
        return entry.key


def new(consortium: str) -> Draft:
    """An empty draft, version 1.

    Raises:
        ConfigError: 201, the consortium's name is not allowed.
    """
    return Draft(consortium, 1, {})


def add(draft: Draft, site: str, key: Ed25519PublicKey, expires: date) -> Draft:
    """Put a site into a draft, or give one that is there a later or an earlier last day.

    A revoked site comes back with a new key only. The key of a site that is not revoked does not
    change, lest a slip in a name put one site in another's place.

    Args:
        draft: is not changed.
        site: its name.
        key: of the site.
        expires: the last day (UTC) on which it is valid.

    Returns:
        The next version of the draft.

    Raises:
        ConfigError: 201, the name, the key or the number of sites is not allowed.
        UsageError: 102, the key is another site's or the revoked one, or nothing would change.
    """
    check_name(site)
    entry = entry_of(key.public_bytes(Encoding.Raw, PublicFormat.Raw), expires)
    before = draft.sites.get(site)
    if before is not None and before.revoked and before.raw == entry.raw:
        raise UsageError(102, f"site {site}: must come back with a new key, got the revoked one")
    if before is not None and not before.revoked and before.raw != entry.raw:
        raise UsageError(
            102, f"site {site}: must keep its key, got another one; to change it, revoke it first"
        )
    if before == entry:
        raise UsageError(102, f"site {site}: must change, got the same key and the same last day")
    for other, held in draft.sites.items():
        if other != site and held.raw == entry.raw:
            raise UsageError(102, f"site {site}: must have a key of its own, got that of {other}")
    return _next(draft, site, entry)


def revoke(draft: Draft, site: str) -> Draft:
    """Take a site's key back; the entry stays, so that the key cannot come back unnoticed.

    Returns:
        The next version of the draft.

    Raises:
        UsageError: 102, the draft does not hold the site, or it is revoked already.
    """
    entry = draft.sites.get(site)
    if entry is None:
        raise UsageError(102, f"site {site[:80]!r}: must be in the roster, got none")
    if entry.revoked:
        raise UsageError(102, f"site {site}: must be valid, got one that is revoked already")
    return _next(draft, site, replace(entry, revoked=True))


def content(roster: Draft | Roster) -> bytes:
    """What is signed: canonical JSON."""
    return dsse.canonical_json(tree_of(roster, str))


def require_apart(draft: Draft, public: Ed25519PublicKey) -> None:
    """Check that the key which is to sign is no site's, lest one secret speak for both.

    A revoked entry may hold it: nobody believes that one.

    Raises:
        UsageError: 102, a site is listed with this key.
    """
    raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
    for site, entry in draft.sites.items():
        if entry.raw == raw and not entry.revoked:
            raise UsageError(
                102,
                f"site {site}: must have a key of its own, got the one that signs the roster; "
                "revoke it and add the site's, or sign with the consortium's key",
            )


def sign(draft: Draft, private: Ed25519PrivateKey) -> bytes:
    """The content of ``roster.json``; the same draft and key give the same bytes."""
    return dsse.sign(content(draft), private, payload_type=PAYLOAD_TYPE)


def open_roster(data: bytes, trusted: Ed25519PublicKey) -> Roster:
    """Read a signed roster.

    Args:
        data: the content of ``roster.json``.
        trusted: the consortium's key.

    Raises:
        DeployError: 917, it is not signed by that key, is damaged, or holds what is not allowed.
    """
    if len(data) > MAX_FILE:
        raise DeployError(_UNUSABLE, f"roster: must hold at most {MAX_FILE} bytes, got more")
    try:
        payload = dsse.open_envelope(data, trusted, "roster", payload_type=PAYLOAD_TYPE)
        return Roster(*parts_of(dsse.parse_canonical(payload, "roster"), iso_date))
    except BundleError as error:
        raise DeployError(_UNUSABLE, error.message) from None
    except ConfigError as error:
        raise DeployError(_UNUSABLE, f"roster: {error.message}") from None


def _next(draft: Draft, site: str, entry: RosterSite) -> Draft:
    return Draft(draft.consortium, draft.version + 1, {**draft.sites, site: entry})


__all__ = [
    "Draft",
    "MAX_FILE",
    "PAYLOAD_TYPE",
    "Roster",
    "RosterSite",
    "add",
    "content",
    "entry_of",
    "new",
    "open_roster",
    "require_apart",
    "revoke",
    "sign",
]
