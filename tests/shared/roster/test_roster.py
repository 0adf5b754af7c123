import hashlib
import json
from datetime import date

import pytest
from builders import refused
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedge.shared.crypto import dsse
from fedge.shared.errors import UsageError
from fedge.shared.roster import roster

CONSORTIUM = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TRUSTED = CONSORTIUM.public_key()
LAST = date(2027, 11, 30)
DAY = date(2027, 6, 1)


def public(number):
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32).public_key()


def draft(*names):
    made = roster.new("Heart study")
    for number, name in enumerate(names, 1):
        made = roster.add(made, name, public(number), LAST)
    return made


def opened(made):
    return roster.open_roster(roster.sign(made, CONSORTIUM), TRUSTED)


def forged(tree):
    """An envelope that the consortium signed around something else."""
    payload = tree if isinstance(tree, bytes) else dsse.canonical_json(tree)
    return dsse.sign(payload, CONSORTIUM, payload_type=roster.PAYLOAD_TYPE)


def test_what_was_signed_is_opened():
    made = roster.revoke(draft("north", "south"), "south")
    found = opened(made)
    assert (found.consortium, found.version) == ("Heart study", 4)
    assert dict(found.sites) == dict(made.sites)
    assert list(found.sites) == ["north", "south"]
    entry = found.sites["north"]
    assert entry.raw == public(1).public_bytes_raw() == entry.key.public_bytes_raw()
    assert (entry.expires, entry.revoked) == (LAST, False)
    assert found.sites["south"].revoked


def test_the_signed_form_is_the_documented_one():
    made = draft("north")
    envelope = json.loads(roster.sign(made, CONSORTIUM))
    assert envelope["payloadType"] == "application/vnd.fedge.roster+json"
    expected = (
        b'{"consortium":"Heart study","sites":{"north":{"expires":"2027-11-30","key":"'
        b'8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c","revoked":false}},'
        b'"version":2}\n'
    )
    assert roster.content(made) == expected
    assert opened(made).digest == hashlib.sha256(expected).hexdigest()
    assert roster.sign(made, CONSORTIUM) == roster.sign(made, CONSORTIUM)


def test_a_draft_vouches_for_nobody_and_is_no_roster():
    assert not isinstance(draft("north"), roster.Roster)
    assert not hasattr(draft("north"), "key_of")


def test_neither_changes_once_made():
    found = opened(draft("north"))
    with pytest.raises(TypeError):
        found.sites["south"] = found.sites["north"]
    with pytest.raises(AttributeError):
        found.version = 9


def test_a_key_vouches_until_the_end_of_its_last_day():
    found = opened(draft("north"))
    assert found.key_of("north", DAY) == public(1)
    assert found.key_of("north", LAST) == public(1)
    message = refused(421, found.key_of, "north", date(2027, 12, 1))
    assert (
        message == "site north: must be valid on 2027-12-01, got one that expired after 2027-11-30"
    )


@pytest.mark.parametrize("name", ["south", "", "NORTH", "north\n", "x" * 10_000])
def test_nobody_else_is_vouched_for(name):
    message = refused(421, opened(draft("north")).key_of, name, DAY)
    assert "must be in the roster" in message
    assert len(message) < 200
    assert "\n" not in message


def test_a_revoked_site_is_not_vouched_for():
    found = opened(roster.revoke(draft("north", "south"), "north"))
    assert "revoked" in refused(421, found.key_of, "north", DAY)
    assert found.key_of("south", DAY) == public(2)


def test_every_edit_raises_the_version_by_one_and_leaves_the_draft_before_it():
    first = roster.new("Heart study")
    second = roster.add(first, "north", public(1), LAST)
    third = roster.revoke(second, "north")
    fourth = roster.add(third, "north", public(2), LAST)
    assert [d.version for d in (first, second, third, fourth)] == [1, 2, 3, 4]
    assert [len(d.sites) for d in (first, second)] == [0, 1]
    assert fourth.sites["north"].key == public(2)
    assert not fourth.sites["north"].revoked


def test_a_revoked_site_comes_back_with_a_new_key_only():
    made = roster.revoke(draft("north"), "north")
    message = refused(102, roster.add, made, "north", public(1), LAST)
    assert message == "site north: must come back with a new key, got the revoked one"


def test_the_key_of_a_site_that_is_not_revoked_does_not_change_by_a_slip():
    message = refused(102, roster.add, draft("north"), "north", public(9), LAST)
    assert "revoke it first" in message


def test_a_last_day_can_be_moved():
    later = roster.add(draft("north"), "north", public(1), date(2029, 1, 1))
    assert later.sites["north"].expires == date(2029, 1, 1)
    assert later.version == 3
    refused(102, roster.add, later, "north", public(1), date(2029, 1, 1))


def test_a_key_has_one_name_even_where_it_is_revoked():
    made = draft("north")
    assert "that of north" in refused(102, roster.add, made, "south", public(1), LAST)
    made = roster.revoke(made, "north")
    assert "that of north" in refused(102, roster.add, made, "south", public(1), LAST)
    tree = json.loads(roster.content(draft("north", "south")))
    tree["sites"]["south"]["key"] = tree["sites"]["north"]["key"]
    message = refused(917, roster.open_roster, forged(tree), TRUSTED)
    assert message == "roster: sites.south.key: must be its own, got that of north"


def test_revoking_needs_a_valid_site():
    made = draft("north")
    refused(102, roster.revoke, made, "south")
    refused(102, roster.revoke, roster.revoke(made, "north"), "north")


@pytest.mark.parametrize("name", ["North", "", "-a", "a-", "a b", "a\n", "a" * 65, "ä"])
def test_a_site_has_a_sites_name(name):
    refused(201, roster.add, draft(), name, public(1), LAST)


@pytest.mark.parametrize("name", ["", " ", " a", "a\n", "a\x1b[31m", "a\u202eb", "x" * 101])
def test_a_consortium_has_a_name_that_prints(name):
    refused(201, roster.new, name)


@pytest.mark.parametrize(
    "text",
    [
        # The points of small order (L times any point gives one of them), and second spellings.
        "00" * 32,
        "01" + "00" * 31,
        "01" + "00" * 30 + "80",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ff" * 32,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    ],
)
def test_a_key_under_which_anybody_signs_is_refused(text):
    refused(201, roster.entry_of, bytes.fromhex(text), LAST)
    tree = json.loads(roster.content(draft("north")))
    tree["sites"]["north"]["key"] = text
    message = refused(917, roster.open_roster, forged(tree), TRUSTED)
    assert message.startswith("roster: sites.north.key: must be an Ed25519 public key")


def test_the_reason_for_it_a_signature_without_a_secret_verifies():
    neutral = (1).to_bytes(32, "little")
    weak = Ed25519PublicKey.from_public_bytes(neutral)
    weak.verify(neutral + bytes(32), b"any message at all")
    with pytest.raises(InvalidSignature):
        public(1).verify(neutral + bytes(32), b"any message at all")


def test_another_key_does_not_open_it():
    data = roster.sign(draft("north"), Ed25519PrivateKey.from_private_bytes(b"\7" * 32))
    message = refused(917, roster.open_roster, data, TRUSTED)
    assert "must be signed by the trusted key" in message


def test_every_byte_counts():
    data = roster.sign(draft("north"), CONSORTIUM)
    for at in range(0, len(data), 7):
        broken = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        refused(917, roster.open_roster, broken, TRUSTED)
    for broken in (b"", data[:-1], data + b"\n", data + data, bytes(roster.MAX_FILE + 1)):
        refused(917, roster.open_roster, broken, TRUSTED)


def test_what_the_consortium_signed_as_something_else_is_no_roster():
    data = dsse.sign(roster.content(draft("north")), CONSORTIUM)
    message = refused(917, roster.open_roster, data, TRUSTED)
    assert "payload of application/vnd.fedge.roster+json" in message


def changed(**values):
    tree = json.loads(roster.content(draft("north")))
    return {**tree, **values}


def entry(**values):
    site = json.loads(roster.content(draft("north")))["sites"]["north"]
    return changed(sites={"north": {**site, **values}})


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        (b"{}", "canonical JSON"),
        (b'{"a":1,"a":1}\n', "canonical JSON"),
        ([], "content: must be a table, got list"),
        ({}, "consortium: must be there"),
        (changed(extra=1), "'extra': must be a known key"),
        (changed(version=0), "version:"),
        (changed(version=True), "version: must be a whole number, got bool"),
        (changed(version=2.0), "version:"),
        (changed(version="2"), "version:"),
        (changed(version=2**53), "version:"),
        (changed(consortium=1), "consortium: must be text"),
        (changed(consortium="\ud800"), "consortium:"),
        (changed(sites=[]), "sites: must be a table"),
        (changed(sites={"north": 1}), "sites.north: must be a table"),
        (changed(sites={"no\nrth": {}}), "site name:"),
        (entry(key=1), "sites.north.key: must be text"),
        (entry(key="AB" * 32), "sites.north.key: must be 64 lower-case"),
        (entry(key="ab" * 31), "sites.north.key: must be 64 lower-case"),
        (entry(key="ab" * 32 + "\n"), "sites.north.key: must be 64 lower-case"),
        (entry(expires="20271130"), "sites.north.expires: must be a date"),
        (entry(expires="2027-W48-2"), "sites.north.expires: must be a date"),
        (entry(expires="2027-02-30"), "sites.north.expires: must be a date"),
        (entry(expires=None), "sites.north.expires: must be a date"),
        (entry(revoked=0), "sites.north.revoked: must be true or false, got int"),
        (entry(revoked=None), "sites.north.revoked:"),
        (entry(weight=1), "sites.north.'weight': must be a known key"),
    ],
)
def test_signed_nonsense_is_refused_by_name(tree, named):
    message = refused(917, roster.open_roster, forged(tree), TRUSTED)
    assert message.startswith("roster: ")
    assert named in message


@pytest.mark.slow
def test_ten_thousand_sites_with_long_names_fit_and_one_more_does_not():
    made = {
        f"{'s' * 57}-{number:05}": roster.RosterSite(public(1), number.to_bytes(32, "little"), LAST)
        for number in range(2, 10_003)
    }
    refused(201, roster.Draft, "c", 1, made)
    made.popitem()
    data = roster.sign(roster.Draft("c" * 100, 2**53 - 1, made), CONSORTIUM)
    assert len(data) < roster.MAX_FILE
    assert len(opened(roster.Draft("c", 1, made)).sites) == 10_000


def test_the_key_that_signs_is_no_sites():
    made = draft("north", "south")
    for site in ("north", "south"):
        with pytest.raises(UsageError, match=f"site {site}: must have a key of its own") as caught:
            roster.require_apart(made, made.sites[site].key)
        assert caught.value.code == 102
    # The twins: another key, and one that was taken back.
    roster.require_apart(made, TRUSTED)
    roster.require_apart(roster.revoke(made, "north"), made.sites["north"].key)
