"""The site registry: one name for one key, and nothing in it but EC P-384 keys."""

from __future__ import annotations

import threading

import pytest
from builders import refused
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedge.client.deployment import node_key
from fedge.server.deployment import site_registry
from fedge.shared.errors import DeployError


def public(key) -> bytes:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


@pytest.fixture
def site(tmp_path):
    def make(name: str):
        return node_key.create(tmp_path / "sites" / name)

    return make


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_sites_are_admitted_and_expelled(home, site):
    assert site_registry.site_keys(home) == {}
    keys = {name: site(name) for name in ("b", "a-b", "a")}
    for name, key in keys.items():
        assert site_registry.admit(home, name, key).read_bytes() == key.read_bytes()
    assert list(site_registry.site_keys(home)) == ["a", "a-b", "b"]
    site_registry.expel(home, "a")
    assert list(site_registry.site_keys(home)) == ["a-b", "b"]
    site_registry.admit(home, "a", keys["a"])
    assert list(site_registry.site_keys(home)) == ["a", "a-b", "b"]


def test_a_name_or_a_key_that_is_known_is_refused(home, site):
    north, south = site("north"), site("south")
    site_registry.admit(home, "north", north)
    assert "second key" in refused(916, site_registry.admit, home, "north", south)
    assert "site north" in refused(916, site_registry.admit, home, "south", north)
    # A comment does not make it another key.
    north.write_bytes(north.read_bytes().strip() + b" me@there\n")
    assert "site north" in refused(916, site_registry.admit, home, "south", north)
    assert list(site_registry.site_keys(home)) == ["north"]


@pytest.mark.parametrize(
    "name", ["", "North", "../north", "a/b", "-a", "a-", "a.b", ".a", "a\n", "x" * 65]
)
def test_a_name_that_is_none_is_refused(home, site, name):
    refused(412, site_registry.admit, home, name, site("north"))
    refused(412, site_registry.expel, home, name)
    assert site_registry.site_keys(home) == {}


def test_an_unknown_site_cannot_be_expelled(home, site):
    site_registry.admit(home, "north", site("north"))
    assert "south" in refused(913, site_registry.expel, home, "south")


def test_a_home_that_is_none_is_named(tmp_path, site):
    refused(901, site_registry.admit, tmp_path / "nowhere", "north", site("north"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "one public key"),
        (b"junk", "OpenSSH's format"),
        (b"ecdsa-sha2-nistp384 AAAA", "OpenSSH's format"),
        (public(ed25519.Ed25519PrivateKey.generate()), "P-384"),
        (public(ec.generate_private_key(ec.SECP256R1())), "P-384"),
        (
            public(ec.generate_private_key(ec.SECP384R1())) + b"\n"
            + public(ec.generate_private_key(ec.SECP384R1())),
            "one public key",
        ),
        (public(ec.generate_private_key(ec.SECP384R1())) + b" " + b"x" * 5000, "at most 4096"),
    ],
    # Keys differ each time, and two test workers must name the cases alike.
    ids=["empty", "junk", "cut", "ed25519", "p256", "two", "long"],
)  # fmt: skip
def test_a_file_that_is_no_sites_key_is_refused(home, tmp_path, content, part):
    path = tmp_path / "site.pub"
    path.write_bytes(content)
    assert part in refused(908, site_registry.admit, home, "north", path)
    # The same, where somebody put it there by hand.
    (home / "sites").mkdir(exist_ok=True)
    (home / "sites" / "north.pub").write_bytes(content)
    assert "north.pub" in refused(908, site_registry.site_keys, home)


def test_a_private_key_is_not_taken(home, site):
    private = site("north").with_suffix(".key")
    assert "private one" in refused(908, site_registry.admit, home, "north", private)


def test_a_stray_file_is_named(home, site):
    site_registry.admit(home, "north", site("north"))
    (home / "sites" / "notes.txt").write_text("x")
    assert "notes.txt" in refused(908, site_registry.site_keys, home)


def test_of_many_at_once_one_gets_the_key_in(home, site):
    key, outcomes = site("north"), []

    def admit(name: str) -> None:
        try:
            site_registry.admit(home, name, key)
            outcomes.append(0)
        except DeployError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=admit, args=(f"site-{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [0, *[916] * 5]
    assert len(site_registry.site_keys(home)) == 1
