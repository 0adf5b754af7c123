import json
import os
import threading
from datetime import date

import builders
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from fedge.client.secagg import trusted_roster
from fedge.client.secagg.trusted_roster import RosterFile
from fedge.shared.crypto import dsse
from fedge.shared.errors import DeployError, ReleaseError, SiteError
from fedge.shared.files import write_atomically
from fedge.shared.roster import roster

LAST = date(2027, 11, 30)
DAY = date(2027, 6, 1)


def private(number):
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


CONSORTIUM, OTHER = private(100), private(101)


def pem(key):
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


ONE = roster.add(roster.new("Heart study"), "north", private(1).public_key(), LAST)
TWO = roster.add(ONE, "south", private(2).public_key(), LAST)
TWO_OTHERWISE = roster.add(ONE, "south", private(3).public_key(), LAST)
THREE = roster.revoke(TWO, "south")


def install(home, draft, key=CONSORTIUM):
    write_atomically(home / "roster.json", roster.sign(draft, key))


def record(home):
    return json.loads((home / "roster-seen.json").read_bytes())


@pytest.fixture
def home(tmp_path):
    (tmp_path / "consortium.pub").write_bytes(pem(CONSORTIUM))
    install(tmp_path, TWO)
    return tmp_path


def stopped(code, home):
    return builders.refused(code, RosterFile, home)


def refused(file):
    return builders.refused(421, file.current)


def test_the_installed_roster_is_read_and_its_version_recorded(home):
    file = RosterFile(home)
    assert file.current().version == TWO.version == 3
    assert file.current() is file.current()
    assert record(home) == {"version": 3, "sha256": file.current().digest}


def test_a_new_version_counts_from_the_next_look(home):
    file = RosterFile(home)
    assert file.current().key_of("south", DAY) == private(2).public_key()
    install(home, THREE)
    assert file.current().version == 4
    assert record(home)["version"] == 4
    with pytest.raises(SiteError):
        file.current().key_of("south", DAY)


def test_an_older_one_is_refused_while_running_and_at_the_start(home):
    file = RosterFile(home)
    install(home, ONE)
    assert "FE-918 roster.json: must be version 3 or later, got 2" in refused(file)
    assert "version 3" in refused(file)
    assert record(home)["version"] == 3
    assert "must be version 3 or later, got 2" in stopped(918, home)
    install(home, TWO)
    assert file.current().version == 3
    assert RosterFile(home).current().version == 3


def test_the_same_version_with_other_content_is_refused(home):
    file = RosterFile(home)
    assert TWO_OTHERWISE.version == TWO.version
    install(home, TWO_OTHERWISE)
    assert "with the content" in refused(file)
    assert "with the content" in stopped(918, home)
    assert record(home)["sha256"] == digest_of(TWO)


def digest_of(draft):
    return roster.open_roster(roster.sign(draft, CONSORTIUM), CONSORTIUM.public_key()).digest


def test_a_version_may_be_left_out(home):
    install(home, ONE)
    file = RosterFile(home)
    install(home, THREE)
    assert file.current().version == 4


def break_missing(home):
    (home / "roster.json").unlink()


def break_unsigned(home):
    (home / "roster.json").write_bytes(roster.content(TWO))


def break_other_key(home):
    install(home, THREE, OTHER)


def break_cut(home):
    write_atomically(home / "roster.json", (home / "roster.json").read_bytes()[:-2])


def break_folder(home):
    (home / "roster.json").unlink()
    (home / "roster.json").mkdir()


def break_large(home):
    write_atomically(home / "roster.json", bytes(roster.MAX_FILE + 1))


def break_trust_missing(home):
    (home / "consortium.pub").unlink()


def break_trust_swapped(home):
    write_atomically(home / "consortium.pub", pem(OTHER))


def break_trust_damaged(home):
    write_atomically(home / "consortium.pub", b"-----BEGIN PUBLIC KEY-----")


@pytest.mark.parametrize(
    "damage",
    [
        break_missing,
        break_unsigned,
        break_other_key,
        break_cut,
        break_folder,
        break_large,
        break_trust_missing,
        break_trust_swapped,
        break_trust_damaged,
    ],
)
def test_one_that_is_not_usable_stops_the_start_and_refuses_all_later(home, damage):
    file = RosterFile(home)
    damage(home)
    assert "FE-917" in refused(file)
    stopped(917, home)
    assert record(home)["version"] == 3
    if (home / "roster.json").is_dir():
        (home / "roster.json").rmdir()
    write_atomically(home / "consortium.pub", pem(CONSORTIUM))
    install(home, TWO)
    assert file.current().version == 3


def test_a_change_of_the_same_size_and_time_is_seen(home):
    file, path = RosterFile(home), home / "roster.json"
    before = path.stat()
    install(home, TWO_OTHERWISE)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused(file)


def test_a_version_that_cannot_be_recorded_is_not_used(home):
    file = RosterFile(home)
    # Where the record's temporary file would be; a full disk does the same.
    (home / ".roster-seen.json.tmp").mkdir()
    install(home, THREE)
    assert "roster-seen.json: cannot be written" in refused(file)
    assert "roster-seen.json: cannot be written" in stopped(917, home)
    assert record(home)["version"] == 3
    (home / ".roster-seen.json.tmp").rmdir()
    assert file.current().version == 4
    assert record(home)["version"] == 4


def test_a_version_that_is_recorded_is_not_written_again(home):
    RosterFile(home)
    (home / ".roster-seen.json.tmp").mkdir()
    assert RosterFile(home).current().version == 3


def test_the_record_is_on_the_disk_before_the_roster_is_returned(home, monkeypatch):
    order = []
    write = trusted_roster.write_atomically
    monkeypatch.setattr(
        trusted_roster, "write_atomically", lambda *args: (order.append("recorded"), write(*args))
    )
    trusted_roster.read(home)
    order.append("used")
    assert order == ["recorded", "used"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}\n",
        b"[]\n",
        b'{"version":3}\n',
        b'{"sha256":"00","version":3}\n',
        b'{"sha256":"' + b"0" * 64 + b'","version":true}\n',
        b'{"sha256":"' + b"0" * 64 + b'","version":"3"}\n',
        b'{"extra":1,"sha256":"' + b"0" * 64 + b'","version":3}\n',
        b'{"sha256": "' + b"0" * 64 + b'","version":3}\n',
        b"x" * 5000,
    ],
)
def test_a_damaged_record_is_not_taken_for_none(home, data):
    (home / "roster-seen.json").write_bytes(data)
    assert "roster-seen.json" in stopped(917, home)
    assert (home / "roster-seen.json").read_bytes() == data


def test_several_threads_read_it_at_once(home):
    file, found = RosterFile(home), []
    install(home, THREE)
    threads = [
        threading.Thread(target=lambda: found.append(file.current().version)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [4] * 8


def test_a_site_knows_itself_by_its_own_key(home):
    dsse.new_key(home / "signing.key")
    own = trusted_roster.own_key(home)
    assert own.public_key() == dsse.load_public(home / "signing.key.pub")
    found = roster.open_roster(
        roster.sign(roster.add(TWO, "west", own.public_key(), LAST), CONSORTIUM),
        CONSORTIUM.public_key(),
    )
    trusted_roster.require_own(found, "west", own, LAST)


def test_no_key_of_its_own_is_said(home):
    with pytest.raises(ReleaseError) as caught:
        trusted_roster.own_key(home)
    assert caught.value.code == 602
    secret = private(1).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (home / "signing.key").write_bytes(secret)
    (home / "signing.key").chmod(0o600)
    assert trusted_roster.own_key(home).public_key() == private(1).public_key()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o660, 0o601])
def test_a_key_that_others_can_read_is_refused(home, mode):
    dsse.new_key(home / "signing.key")
    (home / "signing.key").chmod(mode)
    with pytest.raises(ReleaseError) as caught:
        trusted_roster.own_key(home)
    assert caught.value.code == 602
    assert f"readable by its owner only, got {mode:04o}" in caught.value.message
    assert "chmod 600" in caught.value.remedy
    for allowed in (0o600, 0o400):
        (home / "signing.key").chmod(allowed)
        trusted_roster.own_key(home)


@pytest.mark.parametrize(
    ("draft", "site", "key", "day", "named"),
    [
        (TWO, "west", 1, DAY, "must be in the roster"),
        (TWO, "north", 2, DAY, f"with the key id {dsse.key_id(private(1).public_key())[:16]}…"),
        (TWO, "north", 2, DAY, f"got {dsse.key_id(private(2).public_key())[:16]}…"),
        (THREE, "south", 2, DAY, "got revoked by the roster; make a new key first"),
        (TWO, "south", 2, date(2027, 12, 1), "expired"),
    ],
)
def test_a_site_that_others_would_not_believe_does_not_start(home, draft, site, key, day, named):
    install(home, draft)
    found = RosterFile(home).current()
    with pytest.raises(DeployError) as caught:
        trusted_roster.require_own(found, site, private(key), day)
    assert caught.value.code == 919
    assert named in caught.value.message
    assert ("make a new key" in caught.value.message) == (draft is THREE)
    # The twin: this name with its own key on a day when it is valid.
    trusted_roster.require_own(found, "north", private(1), DAY)
