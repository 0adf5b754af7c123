"""`fedge site init` for secure aggregation: a roster that lists the site's key is installed, any other is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from builders import refused

from fedge.client.deployment import operations
from fedge.client.deployment.operations import Trust
from fedge.client.secagg import trusted_roster
from fedge.client.settings import policy
from fedge.client.settings.policy import PolicyFile
from fedge.client.worker.process import _anchors
from fedge.shared.cli.main import main
from fedge.shared.crypto import dsse
from fedge.shared.daemon import home as homes
from fedge.shared.roster import roster

HASH = "0f" * 32
LAST = "2999-11-30"


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """A folder with a consortium's key and a signed roster of two sites, whose keys lie in their homes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ca.crt").write_text("a certificate")
    dsse.new_key(tmp_path / "consortium.key")
    run("roster", "new", "roster.toml", "--consortium", "Heart study")
    for site in ("north", "south"):
        (tmp_path / site).mkdir()
        dsse.new_key(tmp_path / site / "signing.key")
        add(site)
    sign()
    capsys.readouterr()
    return tmp_path


def run(*words: str) -> None:
    assert main(list(words)) == 0


def add(site: str) -> None:
    run("roster", "add", "roster.toml", site, "--key", f"{site}/signing.key.pub", "--expires", LAST)


def sign() -> None:
    run("roster", "sign", "roster.toml", "--key", "consortium.key")


def init(home: str, name: str, *more: str) -> int:
    words = ["site", "init", name, "--home", home, "--task", "digits", "--server", "h:1"]
    return main([*words, "--ca", "ca.crt", *more])


TRUSTED = ("--roster", "roster.json", "--consortium", "consortium.key.pub")


def make(place: Path, name: str = "north") -> str:
    return operations.init(
        place / name,
        name,
        task="digits",
        server="h:1",
        ca=place / "ca.crt",
        bundle=HASH,
        secure=policy.SecurePolicy(required=True),
        trust=Trust(place / "roster.json", place / "consortium.key.pub"),
    )


@pytest.mark.slow
def test_a_site_that_the_roster_holds_is_ready_for_secure_aggregation(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init("north", "north", *TRUSTED, "--min-sites", "3") == 0
    said = capsys.readouterr().out
    assert "(version 3 of Heart study, 2 sites)" in said
    assert "give it to the consortium" not in said
    home = place / "north"
    terms = policy.read(home).secure_aggregation
    assert (terms.required, terms.min_sites) == (True, 3)
    # What the worker will do with it, with nothing added by hand.
    anchors = _anchors("north", home, PolicyFile(home))
    assert anchors is not None
    assert anchors.roster().version == 3
    assert anchors.min_sites() == 3
    assert (home / trusted_roster.SEEN).exists()


@pytest.mark.slow
def test_without_a_roster_nothing_is_required(place: Path) -> None:
    assert init("west", "west") == 0
    home = place / "west"
    assert policy.read(home).secure_aggregation.required is False
    assert (home / trusted_roster.KEY).stat().st_mode & 0o077 == 0
    assert not (home / trusted_roster.FILE).exists()
    assert _anchors("west", home, PolicyFile(home)) is None


@pytest.mark.slow
def test_the_fewest_sites_have_a_default(place: Path) -> None:
    assert init("north", "north", *TRUSTED) == 0
    assert policy.read(place / "north").secure_aggregation.min_sites == 5


@pytest.mark.parametrize(
    ("more", "label"),
    [
        (TRUSTED[:2], "FE-102"),
        (TRUSTED[2:], "FE-102"),
        (("--min-sites", "3"), "FE-102"),
        ((*TRUSTED, "--min-sites", "2"), "FE-201"),
        (("--roster", "none.json", *TRUSTED[2:]), "FE-917"),
        ((*TRUSTED[:2], "--consortium", "none.pub"), "FE-917"),
        ((*TRUSTED[:2], "--consortium", "south/signing.key.pub"), "FE-917"),
        (("--roster", "roster.toml", *TRUSTED[2:]), "FE-917"),
    ],
)
def test_what_the_command_refuses(
    place: Path, more: tuple[str, ...], label: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init("north", "north", *more) != 0
    assert capsys.readouterr().err.startswith(f"{label} ")
    assert sorted(p.name for p in (place / "north").iterdir()) == ["signing.key", "signing.key.pub"]


def test_a_site_without_its_key_is_refused_before_a_home_is_made(place: Path) -> None:
    assert "signing.key" in refused(919, make, place, "west")
    assert not (place / "west").exists()


def test_another_sites_name_or_key_is_refused(place: Path) -> None:
    (place / "south" / "signing.key").rename(place / "north" / "signing.key")
    refused(919, make, place)
    assert not (place / "north" / "site.toml").exists()


def test_a_revoked_site_is_refused(place: Path) -> None:
    run("roster", "revoke", "roster.toml", "north")
    sign()
    refused(919, make, place)


def test_a_damaged_key_is_refused(place: Path) -> None:
    (place / "north" / "signing.key").write_text("no key")
    refused(602, make, place)


def test_a_roster_older_than_one_that_the_home_has_used_is_refused(place: Path) -> None:
    make(place)
    (place / "north" / "site.toml").unlink()  # as an init that was killed would leave it
    old = (place / "roster.json").read_bytes()
    run("roster", "revoke", "roster.toml", "south")
    sign()
    make(place)
    (place / "north" / "site.toml").unlink()
    (place / "roster.json").write_bytes(old)
    refused(918, make, place)
    assert not (place / "north" / "site.toml").exists()


def test_what_is_installed_is_what_was_checked(place: Path) -> None:
    make(place)
    home = place / "north"
    assert (home / trusted_roster.FILE).read_bytes() == (place / "roster.json").read_bytes()
    known = roster.open_roster(
        (home / trusted_roster.FILE).read_bytes(), dsse.load_public(home / trusted_roster.TRUST)
    )
    known.key_of("north", datetime.now(UTC).date())
    assert homes.held(home) is False
