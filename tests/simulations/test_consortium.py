"""Rosters of this machine: as a consortium signs them, for as long as a local federation lasts."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.shared.errors import FedgeError, SiteError
from fedge.shared.roster import roster
from fedge.simulations import consortium

TODAY = datetime.now(UTC).date()
SITES = ["site-1", "site-2", "site-3"]


def test_a_roster_lists_its_sites_and_no_others():
    keys = {site: Ed25519PrivateKey.generate() for site in SITES}
    signer = Ed25519PrivateKey.generate()
    found = roster.open_roster(consortium.signed_roster(keys, signer), signer.public_key())
    for site, key in keys.items():
        assert found.key_of(site, TODAY) == key.public_key()
        assert found.key_of(site, TODAY + timedelta(days=3600)) == key.public_key()
    for day, site in ((TODAY, "site-4"), (TODAY + timedelta(days=3700), "site-1")):
        with pytest.raises(SiteError) as caught:
            found.key_of(site, day)
        assert caught.value.code == 421


def test_it_is_that_consortiums_alone():
    signed = consortium.signed_roster({}, Ed25519PrivateKey.generate())
    with pytest.raises(FedgeError):
        roster.open_roster(signed, Ed25519PrivateKey.generate().public_key())


def test_simulated_sites_believe_each_other_with_keys_of_the_moment():
    roster_bytes, again = consortium.anchors(SITES, 3), consortium.anchors(SITES, 3)
    assert list(roster_bytes) == SITES
    for site, own in roster_bytes.items():
        assert own.site == site
        assert own.min_sites() == 3
        for peer in SITES:
            assert own.roster().key_of(peer, TODAY) == roster_bytes[peer].private.public_key()
        with pytest.raises(AssertionError):
            assert own.roster().key_of(site, TODAY) == again[site].private.public_key()
