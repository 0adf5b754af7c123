"""A worker starts with secure aggregation only with a policy that requires it and a roster that lists its key."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.client.secagg import trusted_roster
from fedge.client.settings import policy_writer
from fedge.client.settings.policy import PolicyFile, SecurePolicy
from fedge.client.worker.process import _anchors
from fedge.shared.crypto import dsse
from fedge.shared.errors import DeployError, ReleaseError, SiteError
from fedge.shared.files import write_atomically
from fedge.shared.roster import roster

GOOD = {"tasks": ["digits"], "bundles": ["ab" * 32], "versions": ["0.1.0"]}
TODAY = datetime.now(UTC).date()
LATER = TODAY + timedelta(days=30)


@pytest.fixture
def consortium(tmp_path):
    dsse.new_key(tmp_path / "consortium.key")
    return dsse.load_private(tmp_path / "consortium.key")


@pytest.fixture
def home(tmp_path):
    """A site whose policy asks for masks, without a roster yet."""
    place = tmp_path / "home"
    place.mkdir()
    dsse.new_key(place / trusted_roster.KEY)
    policy_writer.write(place, **GOOD, secure=SecurePolicy(required=True))
    return place


def draft(home, *others):
    made = roster.add(
        roster.new("study"), "site-1", trusted_roster.own_key(home).public_key(), LATER
    )
    for name in others:
        made = roster.add(made, name, Ed25519PrivateKey.generate().public_key(), LATER)
    return made


def install(home, tmp_path, consortium, made):
    (home / trusted_roster.TRUST).write_bytes(
        dsse.public_path(tmp_path / "consortium.key").read_bytes()
    )
    write_atomically(home / trusted_roster.FILE, roster.sign(made, consortium))


def stopped(home, code, site="site-1"):
    with pytest.raises(DeployError) as caught:
        _anchors(site, home, PolicyFile(home))
    assert caught.value.code == code
    return caught.value.message


def test_without_roster_and_requirement_there_is_nothing_to_trust(home):
    policy_writer.write(home, **GOOD)
    assert _anchors("site-1", home, PolicyFile(home)) is None


def test_where_masks_are_required_a_roster_must_be_there(home):
    stopped(home, 917)


def test_the_anchors_are_the_sites_own(home, tmp_path, consortium):
    install(home, tmp_path, consortium, draft(home, "site-2"))
    policies = PolicyFile(home)
    found = _anchors("site-1", home, policies)
    assert found.site == "site-1"
    key = found.roster().key_of("site-1", TODAY)
    assert key == found.private.public_key()
    assert found.min_sites() == 5
    # Both are as their files say now, without a restart.
    policy_writer.write(home, **GOOD, secure=SecurePolicy.model_validate({"min-sites": 9}))
    assert found.min_sites() == 9
    made = roster.revoke(draft(home, "site-2"), "site-2")
    install(home, tmp_path, consortium, made)
    with pytest.raises(SiteError) as caught:
        found.roster().key_of("site-2", TODAY)
    assert caught.value.code == 421


def test_a_roster_is_used_where_masks_are_not_required_too(home, tmp_path, consortium):
    policy_writer.write(home, **GOOD)
    install(home, tmp_path, consortium, draft(home))
    assert _anchors("site-1", home, PolicyFile(home)) is not None


def test_a_roster_of_somebody_else_is_refused(home, tmp_path, consortium):
    install(home, tmp_path, consortium, draft(home))
    write_atomically(
        home / trusted_roster.FILE, roster.sign(draft(home), Ed25519PrivateKey.generate())
    )
    stopped(home, 917)


def test_an_older_roster_is_refused(home, tmp_path, consortium):
    install(home, tmp_path, consortium, draft(home, "site-2", "site-3"))
    _anchors("site-1", home, PolicyFile(home))
    install(home, tmp_path, consortium, draft(home, "site-2"))
    assert "version 4 or later, got 3" in stopped(home, 918)


def test_a_roster_with_another_key_or_without_the_site_is_refused(home, tmp_path, consortium):
    install(home, tmp_path, consortium, draft(home, "site-2"))
    stopped(home, 919, site="site-2")
    stopped(home, 919, site="site-3")
    made = draft(home, "site-2", "site-3")
    install(home, tmp_path, consortium, roster.revoke(made, "site-1"))
    stopped(home, 919)


def test_a_site_without_its_key_does_not_start(home, tmp_path, consortium):
    install(home, tmp_path, consortium, draft(home))
    (home / trusted_roster.KEY).unlink()
    with pytest.raises(ReleaseError) as caught:
        _anchors("site-1", home, PolicyFile(home))
    assert caught.value.code == 602
