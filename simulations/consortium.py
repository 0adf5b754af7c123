"""A local consortium: keys and a signed roster for the sites of a simulation or a local federation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.shared.roster import roster
from fedge.shared.roster.draft import Draft, entry_of

if TYPE_CHECKING:
    from fedge.client.secagg.session import Anchors

#: Validity of every entry; a local federation does not last longer.
VALID_DAYS: Final = 3650


def signed_roster(keys: Mapping[str, Ed25519PrivateKey], consortium: Ed25519PrivateKey) -> bytes:
    """A roster of these sites, signed by a consortium.

    Args:
        keys: each site's private key, by name.
        consortium: private key that signs the roster.
    """
    expires = (datetime.now(UTC) + timedelta(days=VALID_DAYS)).date()
    sites = {
        site: entry_of(key.public_key().public_bytes_raw(), expires) for site, key in keys.items()
    }
    return roster.sign(Draft("local federation", 1, sites), consortium)


def anchors(sites: Iterable[str], min_sites: int) -> dict[str, Anchors]:
    """Trust anchors of each simulated site: a roster under a temporary key that is held in memory only.

    Args:
        sites: their names.
        min_sites: smallest number of sites in a secure sum.
    """
    # Only where sites are simulated: it imports torch, which no daemon's parent may hold.
    from fedge.client.secagg.session import Anchors

    consortium = Ed25519PrivateKey.generate()
    keys = {site: Ed25519PrivateKey.generate() for site in sites}
    verified = roster.open_roster(signed_roster(keys, consortium), consortium.public_key())
    return {
        site: Anchors(site, key, lambda: verified, lambda: min_sites) for site, key in keys.items()
    }
