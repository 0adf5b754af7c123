from datetime import date

import pytest
from builders import refused
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.shared.errors import ReleaseError
from fedge.shared.roster import draft as roster_draft
from fedge.shared.roster import roster

LAST = date(2027, 11, 30)


def made():
    draft = roster.new('Études "du cœur" 🫀')
    for number, name in enumerate(("south", "north"), 1):
        key = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32).public_key()
        draft = roster.add(draft, name, key, LAST)
    return roster.revoke(draft, "south")


@pytest.fixture
def path(tmp_path):
    roster_draft.write_draft(tmp_path / "roster.toml", made())
    return tmp_path / "roster.toml"


def test_a_draft_is_written_and_read_again(path):
    assert roster_draft.read_draft(path) == made()


def test_an_empty_one_too(tmp_path):
    roster_draft.write_draft(tmp_path / "r.toml", roster.new("c"))
    assert roster_draft.read_draft(tmp_path / "r.toml") == roster.new("c")


def test_people_can_review_it(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "version = 4" in text.splitlines()
    north = text[text.index("[sites.north]") :]
    assert north.index("expires = 2027-11-30\n") < north.index("revoked = false\n")
    assert text.index("[sites.north]") < text.index("[sites.south]")


@pytest.mark.parametrize(
    ("old", "new", "code", "named"),
    [
        ("version = 4", "version = 0", 201, "roster.toml: version: must be 1 to 2^53 - 1"),
        # Longer than Python prints a number.
        ("version = 4", "version = 0x" + "f" * 9000, 201, "version: must be 1 to 2^53 - 1"),
        ("version = 4", "", 201, "version: must be there"),
        ("version = 4", "version = 4\nversions = 4", 202, "'versions': must be a known key"),
        ("version = 4", "version = 4\nversion = 5", 204, "must be TOML"),
        ("2027-11-30", "2027-11-30T00:00:00Z", 201, "expires: must be a date like 2027-11-30"),
        ("2027-11-30", '"2027-11-30"', 201, "without quotes, got str"),
        ("2027-11-30", "2027-02-30", 204, "must be TOML"),
        ("[sites.north]", "[sites.North]", 201, "site name: must match"),
        ("[sites.north]", "[sites.south]", 204, "must be TOML"),
        ("revoked = false", "", 201, "sites.north.revoked: must be there"),
        ("revoked = false", "revoked = 0", 201, "sites.north.revoked: must be true or false"),
    ],
)
def test_a_slip_in_the_draft_is_named(path, old, new, code, named):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert named in refused(code, roster_draft.read_draft, path)


def test_what_is_no_readable_file_is_refused(tmp_path):
    refused(203, roster_draft.read_draft, tmp_path / "missing")
    refused(203, roster_draft.read_draft, tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff")
    refused(203, roster_draft.read_draft, tmp_path / "bytes")
    (tmp_path / "large").write_bytes(b"#" * (roster.MAX_FILE + 1))
    refused(203, roster_draft.read_draft, tmp_path / "large")
    (tmp_path / "deep").write_text("a = " + "[" * 100_000)
    refused(204, roster_draft.read_draft, tmp_path / "deep")


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(ReleaseError) as caught:
        roster_draft.write_draft(tmp_path / "no" / "roster.toml", made())
    assert caught.value.code == 606
