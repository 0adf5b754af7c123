"""A site's key: as Flower reads it, for its owner only, never overwritten. test_front.py has a SuperNode use it."""

from __future__ import annotations

import stat

import pytest
from builders import refused
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedge.client.deployment import node_key


@pytest.fixture
def home(tmp_path):
    node_key.create(tmp_path / "home")
    return tmp_path / "home"


def private(key, format=PrivateFormat.OpenSSH, encryption=None) -> bytes:
    return key.private_bytes(Encoding.PEM, format, encryption or NoEncryption())


def test_the_pair_is_what_flower_reads(home):
    key, public = home / "site.key", home / "site.pub"
    loaded = load_ssh_private_key(key.read_bytes(), None)
    assert loaded.curve.name == "secp384r1"
    assert load_ssh_public_key(public.read_bytes()) == loaded.public_key()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert sorted(path.name for path in home.iterdir()) == ["site.key", "site.pub"]
    node_key.check(key)


def test_nothing_is_overwritten(home):
    before = (home / "site.key").read_bytes()
    assert "site.key: must not exist yet" in refused(903, node_key.create, home)
    assert (home / "site.key").read_bytes() == before


def test_a_creation_that_was_killed_is_finished_with_the_same_key(home):
    key = (home / "site.key").read_bytes()
    public = (home / "site.pub").read_bytes()
    (home / "site.pub").unlink()
    assert "site.pub" in refused(908, node_key.check, home / "site.key")
    assert node_key.create(home) == home / "site.pub"
    assert ((home / "site.key").read_bytes(), (home / "site.pub").read_bytes()) == (key, public)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o606])
def test_a_key_that_others_may_read_is_refused(home, mode):
    (home / "site.key").chmod(mode)
    assert f"owner only, got {mode:04o}" in refused(908, node_key.check, home / "site.key")


def test_the_public_key_of_another_pair_is_refused(home, tmp_path):
    (home / "site.pub").write_bytes(node_key.create(tmp_path / "other").read_bytes())
    assert "must be the public key of" in refused(908, node_key.check, home / "site.key")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "OpenSSH's format"),
        (b"junk", "OpenSSH's format"),
        (b"\x00" * 17_000, "at most 16384"),
        (private(ec.generate_private_key(ec.SECP256R1())), "P-384"),
        (private(ec.generate_private_key(ec.SECP384R1()), PrivateFormat.PKCS8), "OpenSSH's format"),
        (
            private(
                ec.generate_private_key(ec.SECP384R1()),
                PrivateFormat.PKCS8,
                BestAvailableEncryption(b"password"),
            ),
            "OpenSSH's format",
        ),
    ],
)
def test_a_file_that_is_no_such_key_is_refused(home, content, part):
    (home / "site.key").write_bytes(content)
    assert part in refused(908, node_key.check, home / "site.key")


def test_a_missing_key_is_named(tmp_path):
    assert "site.key: cannot be read" in refused(908, node_key.check, tmp_path / "site.key")
