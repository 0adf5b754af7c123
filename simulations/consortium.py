"""A consortium on this machine: keys and a signed roster for the sites of a simulation or a local federation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.shared.roster import roster
from fedge.shared.roster.draft import Draft, entry_of

if TYPE_CHECKING:
    from fedge.client.secagg.session import Anchors

#: Of every entry; a local federation does not last longer.
VALID_DAYS: Final = 3650


def signed_roster(keys: Mapping[str, Ed25519PrivateKey], consortium: Ed25519PrivateKey) -> bytes:
    """A roster of these sites, signed."""
    expires = (datetime.now(UTC) + timedelta(days=VALID_DAYS)).date()
    sites = {
        site: entry_of(key.public_key().public_bytes_raw(), expires) for site, key in keys.items()
    }
    return roster.sign(Draft("local federation", 1, sites), consortium)


def anchors(sites: Iterable[str], min_sites: int) -> dict[str, Anchors]:
    """What each site of a simulation trusts: a roster under a key of the moment, held in memory alone."""
    # Only where sites are simulated: it imports torch, which no daemon's parent may hold.
    from fedge.client.secagg.session import Anchors

    consortium = Ed25519PrivateKey.generate()
    keys = {site: Ed25519PrivateKey.generate() for site in sites}
    known = roster.open_roster(signed_roster(keys, consortium), consortium.public_key())
    return {
        site: Anchors(site, key, lambda: known, lambda: min_sites) for site, key in keys.items()
    }
