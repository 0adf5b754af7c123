import json
from datetime import date

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.shared.cli import main
from fedge.shared.commands.roster import SOON, shown
from fedge.shared.crypto.dsse import key_id, load_public
from fedge.shared.roster import roster

LAST = "2999-11-30"


@pytest.fixture
def fedge(tmp_path, capsys, monkeypatch):
    """Runs a command in a folder with keys of a consortium and two sites; gives status, output, error."""
    monkeypatch.chdir(tmp_path)
    for name in ("consortium.key", "north.key", "south.key"):
        assert main.main(["keys", "new", name]) == 0
    capsys.readouterr()

    def run(*words):
        status = main.main(["roster", *words])
        return status, *capsys.readouterr()

    run.folder = tmp_path
    return run


def good(found):
    status, out, err = found
    assert (status, err) == (0, "")
    return out


def bad(found, status, label):
    assert found[:2] == (status, "")
    assert found[2].count("\n") == 1
    assert found[2].startswith(f"{label} ")
    assert " Remedy: " in found[2]
    return found[2]


@pytest.fixture
def drafted(fedge):
    good(fedge("new", "roster.toml", "--consortium", "Heart study"))
    good(fedge("add", "roster.toml", "north", "--key", "north.key.pub", "--expires", LAST))
    return fedge


def sign(fedge, *more):
    return fedge("sign", "roster.toml", "--key", "consortium.key", *more)


def verify(fedge, *more):
    return fedge("verify", "roster.json", "--trust", "consortium.key.pub", *more)


def test_from_a_draft_to_a_roster_that_a_site_can_use(drafted):
    good(drafted("add", "roster.toml", "south", "--key", "south.key.pub", "--expires", LAST))
    good(drafted("revoke", "roster.toml", "south"))
    made = json.loads(good(sign(drafted, "--json")))
    trusted = load_public(drafted.folder / "consortium.key.pub")
    assert made == {
        "file": "roster.json",
        "consortium": "Heart study",
        "version": 4,
        "sites": 2,
        "signed_by": key_id(trusted),
    }
    found = roster.open_roster((drafted.folder / "roster.json").read_bytes(), trusted)
    expected = load_public(drafted.folder / "north.key.pub")
    assert found.key_of("north", date(2999, 11, 30)) == expected
    assert found.sites["south"].revoked


def test_verify_shows_a_table_or_json(drafted):
    good(sign(drafted))
    lines = good(verify(drafted)).splitlines()
    assert lines[:2] == ["consortium  Heart study", "version     2"]
    assert lines[-2].split() == ["site", "last", "day", "key", "id", "state"]
    assert lines[-1].split()[:2] + lines[-1].split()[-1:] == ["north", LAST, "valid"]
    found = json.loads(good(verify(drafted, "--json")))
    public = load_public(drafted.folder / "north.key.pub")
    assert f" {key_id(public)[:16]}… " in lines[-1]
    (row,) = found["sites"]
    assert row["days"] > 300_000
    assert row == {
        "site": "north",
        "key": public.public_bytes_raw().hex(),
        "key_id": key_id(public),
        "expires": LAST,
        "days": row["days"],
        "revoked": False,
        "state": "valid",
    }


def test_add_prints_the_id_that_keys_new_printed_at_the_site(drafted):
    words = ("add", "roster.toml", "south", "--key", "south.key.pub", "--expires", LAST)
    wanted = key_id(load_public(drafted.folder / "south.key.pub"))
    lines = good(drafted(*words)).splitlines()
    assert lines[-2:] == ["site        south", f"key id      {wanted}"]
    good(drafted("revoke", "roster.toml", "north"))
    words = ("add", "roster.toml", "south", "--key", "south.key.pub", "--expires", "2998-01-01")
    found = json.loads(good(drafted(*words, "--json")))
    assert (found["site"], found["key_id"], found["version"]) == ("south", wanted, 5)


def test_the_key_that_signs_is_no_sites(drafted):
    words = ("add", "roster.toml", "east", "--expires", LAST, "--key")
    good(drafted(*words, "consortium.key.pub"))
    assert "site east: must have a key of its own" in bad(sign(drafted), 2, "FE-102")
    assert not (drafted.folder / "roster.json").exists()
    # The way out that the message names.
    good(drafted("revoke", "roster.toml", "east"))
    good(drafted(*words, "south.key.pub"))
    good(sign(drafted))


def test_an_empty_roster_is_shown_too(fedge):
    good(fedge("new", "roster.toml", "--consortium", "c"))
    good(sign(fedge))
    assert "sites       0\n" in good(verify(fedge))


@pytest.mark.parametrize(
    ("today", "state"),
    [
        (date(2027, 6, 1), "valid"),
        (date(2027, 9, 30), "valid"),
        (date(2027, 10, 1), "expires in 60 days"),
        (date(2027, 11, 29), "expires in 1 day"),
        (date(2027, 11, 30), "expires today"),
        (date(2027, 12, 1), "expired"),
    ],
)
def test_the_state_of_a_site(today, state):
    assert SOON == 60
    keys = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3)]
    draft = roster.new("c")
    for name, key in zip(("north", "south"), keys, strict=False):
        draft = roster.add(draft, name, key.public_key(), date(2027, 11, 30))
    draft = roster.revoke(draft, "south")
    opened = roster.open_roster(roster.sign(draft, keys[2]), keys[2].public_key())
    states = {row["site"]: row["state"] for row in shown(opened, today)["sites"]}
    assert states == {"north": state, "south": "revoked"}


def test_new_overwrites_no_draft(drafted):
    before = (drafted.folder / "roster.toml").read_bytes()
    found = bad(drafted("new", "roster.toml", "--consortium", "c"), 1, "FE-605")
    assert "`fedge roster add` and `revoke` change a draft" in found
    assert (drafted.folder / "roster.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "status", "label"),
    [
        (("revoke", "roster.toml", "south"), 2, "FE-102"),
        (("revoke", "other.toml", "north"), 1, "FE-203"),
        (("add", "roster.toml", "north", "--key", "south.key.pub", "--expires", LAST), 2, "FE-102"),
        (("add", "roster.toml", "south", "--key", "north.key.pub", "--expires", LAST), 2, "FE-102"),
        (("add", "roster.toml", "South", "--key", "south.key.pub", "--expires", LAST), 1, "FE-201"),
        (("add", "roster.toml", "south", "--key", "south.key", "--expires", LAST), 1, "FE-707"),
        (("add", "roster.toml", "south", "--key", "nowhere", "--expires", LAST), 1, "FE-707"),
        (
            ("add", "roster.toml", "south", "--key", "south.key.pub", "--expires", "2999-1-1"),
            2,
            "FE-102",
        ),
        (
            ("add", "roster.toml", "south", "--key", "south.key.pub", "--expires", "2020-01-01"),
            2,
            "FE-102",
        ),
        (("sign", "roster.toml", "--key", "consortium.key.pub"), 1, "FE-602"),
        (("sign", "roster.toml", "--key", "consortium.key", "--out", "no/r.json"), 1, "FE-606"),
        (("verify", "roster.json", "--trust", "consortium.key.pub"), 1, "FE-917"),
        (("verify", "roster.toml", "--trust", "consortium.key.pub"), 1, "FE-917"),
        ((), 2, "FE-102"),
    ],
)
def test_a_refused_command_says_so_in_one_line_and_leaves_the_draft(drafted, words, status, label):
    before = (drafted.folder / "roster.toml").read_bytes()
    message = bad(drafted(*words), status, label)
    assert "PRIVATE" not in message
    assert (drafted.folder / "roster.toml").read_bytes() == before


def test_another_key_does_not_verify(drafted):
    good(sign(drafted))
    found = drafted("verify", "roster.json", "--trust", "north.key.pub")
    assert "must be signed by the trusted key" in bad(found, 1, "FE-917")


def test_signing_replaces_an_older_version_only(drafted):
    file, draft = drafted.folder / "roster.json", drafted.folder / "roster.toml"
    good(sign(drafted))
    first, text = file.read_bytes(), draft.read_text()
    good(sign(drafted))
    assert file.read_bytes() == first
    # By hand, without a new version: two rosters would have the same number.
    draft.write_text(text.replace(LAST, "2999-01-01"))
    assert "version 2 with other content" in bad(sign(drafted), 1, "FE-605")
    draft.write_text(text.replace("version = 2", "version = 1"))
    assert "version 2 with other content" in bad(sign(drafted), 1, "FE-605")
    assert file.read_bytes() == first
    draft.write_text(text)
    good(drafted("revoke", "roster.toml", "north"))
    good(sign(drafted))
    assert "revoked" in good(verify(drafted))


def test_signing_replaces_nothing_else(drafted):
    good(sign(drafted))
    before = (drafted.folder / "roster.json").read_bytes()
    good(drafted("revoke", "roster.toml", "north"))
    found = bad(drafted("sign", "roster.toml", "--key", "north.key"), 1, "FE-605")
    assert "sign with the consortium's key" in found
    bad(sign(drafted, "--out", "consortium.key"), 1, "FE-605")
    bad(sign(drafted, "--out", "roster.toml"), 1, "FE-605")
    bad(sign(drafted, "--out", "."), 1, "FE-605")
    draft = drafted.folder / "roster.toml"
    draft.write_text(draft.read_text().replace("Heart study", "Lung study"))
    assert "must be of Lung study, got Heart study" in bad(sign(drafted), 1, "FE-605")
    assert (drafted.folder / "roster.json").read_bytes() == before


def test_the_draft_decides_where_the_roster_goes_unless_out_says(drafted):
    good(sign(drafted, "--out", "elsewhere.json"))
    assert not (drafted.folder / "roster.json").exists()
    assert (drafted.folder / "elsewhere.json").is_file()


def test_help_fits_a_screen(fedge, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in ((), ("new",), ("add",), ("revoke",), ("sign",), ("verify",)):
        lines = good(fedge(*words, "--help")).splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert "example:" in lines
