"""The server's authority and certificate: usable by a strict client, never overwritten, every defect named."""

from __future__ import annotations

import shutil
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
from builders import refused
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedge.server.deployment import certificates

HOSTS = ["fed.example.org", "192.0.2.7", "2001:db8::7"]


@pytest.fixture
def home(tmp_path):
    certificates.create(tmp_path / "home", HOSTS)
    return tmp_path / "home"


@pytest.fixture
def other(tmp_path):
    certificates.create(tmp_path / "other", HOSTS)
    return tmp_path / "other"


def now() -> datetime:
    return datetime.now(UTC)


def handshake(home, trusted, name: str) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificates.certificate_path(home), certificates.key_path(home))
    client = ssl.create_default_context(cafile=certificates.authority_path(trusted))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    here, there = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(there, server_side=True).close()
        except OSError:
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(here, server_hostname=name).close()
    finally:
        here.close()
        thread.join()


@pytest.mark.parametrize("name", [*HOSTS, "localhost", "127.0.0.1"])
def test_a_strict_client_trusts_every_name(home, name):
    handshake(home, home, name)


def test_a_client_refuses_another_name_and_another_authority(home, other):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(home, home, "fed.example.com")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(home, other, HOSTS[0])


def test_what_the_certificates_may_be_used_for(home):
    authority, server = (
        x509.load_pem_x509_certificate(path.read_bytes())
        for path in (certificates.authority_path(home), certificates.certificate_path(home))
    )
    for certificate, is_authority in ((authority, True), (server, False)):
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert (basic.critical, usage.critical) == (True, True)
        assert basic.value.ca is usage.value.key_cert_sign is is_authority
        assert usage.value.digital_signature is not is_authority
        assert certificate.public_key().curve.name == "secp384r1"
    assert (
        authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    )
    extended = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_private_keys_are_their_owners(home):
    for folder in ("ca", "tls"):
        assert stat.S_IMODE((home / folder).stat().st_mode) == 0o700
    for key in (home / "ca" / "ca.key", certificates.key_path(home)):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert not [path for path in home.iterdir() if path.name.startswith(".")]


def test_nothing_is_overwritten(home):
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert "tls" in refused(903, certificates.create, home, HOSTS)
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_a_creation_that_was_killed_is_finished_with_the_same_authority(home):
    authority = certificates.authority_path(home).read_bytes()
    shutil.rmtree(home / "tls")
    certificates.create(home, HOSTS)
    assert certificates.authority_path(home).read_bytes() == authority
    handshake(home, home, HOSTS[0])


@pytest.mark.parametrize(
    "host", ["", "a b", "-a", "1.2.3", "1.2.3.400", "a..b", "x" * 64, "ü.org", "a\n", "a_b", "*.a"]
)
def test_a_host_that_is_none_is_refused(tmp_path, host):
    assert "host: must be" in refused(904, certificates.create, tmp_path / "home", [host])
    assert not (tmp_path / "home").exists()


def test_too_many_hosts_are_refused(tmp_path):
    hosts = [f"h{i}.example.org" for i in range(101)]
    assert "at most 100, got 101" in refused(904, certificates.create, tmp_path, hosts)


@pytest.mark.parametrize("new_key", [False, True])
def test_a_renewal_keeps_names_and_authority(home, new_key):
    certificate, key = certificates.certificate_path(home), certificates.key_path(home)
    authority = certificates.authority_path(home).read_bytes()
    before = certificate.read_bytes(), key.read_bytes()
    certificates.renew(home, days=100, new_key=new_key)
    assert certificate.read_bytes() != before[0]
    assert (key.read_bytes() != before[1]) is new_key
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert certificates.authority_path(home).read_bytes() == authority
    assert certificates.check(home, now()) == 99
    for name in HOSTS:
        handshake(home, home, name)


def test_a_renewal_mends_a_pair_that_does_not_match(home, other):
    shutil.copy(certificates.key_path(other), certificates.key_path(home))
    assert "server.key: must be the key of" in refused(907, certificates.check, home, now())
    certificates.renew(home)
    certificates.check(home, now())


def test_a_renewal_needs_the_authoritys_own_key(home, other):
    shutil.copy(other / "ca" / "ca.key", home / "ca" / "ca.key")
    assert "ca.key: must be the key of" in refused(907, certificates.renew, home)


def test_days_left_and_their_warning(home):
    assert certificates.check(home, now()) == 824
    assert certificates.check(home, now() + timedelta(days=800), host=HOSTS[0]) == 24
    assert certificates.warning(30) is None
    assert "29 days" in (certificates.warning(29) or "")
    assert "1 day:" in (certificates.warning(1) or "")
    assert "less than a day" in (certificates.warning(0) or "")


def test_a_certificate_ends_with_its_authority_at_the_latest(home):
    certificates.renew(home, days=10_000)
    assert certificates.check(home, now()) == 3649
    assert "days: must be at least 1" in refused(907, certificates.renew, home, days=0)


@pytest.mark.parametrize(("days", "part"), [(826, "until"), (4000, "until"), (-1, "from")])
def test_outside_its_time_it_is_refused(home, days, part):
    said = refused(907, certificates.check, home, now() + timedelta(days=days))
    assert "valid now" in said
    assert part in said


@pytest.mark.parametrize("host", ["fed.example.com", "192.0.2.8", "example.org"])
def test_another_host_is_refused(home, host):
    said = refused(907, certificates.check, home, now(), host=host)
    assert f"for {host}" in said
    assert "fed.example.org" in said


@pytest.mark.parametrize("host", [*HOSTS, "FED.example.org", "2001:db8:0::7", "localhost"])
def test_its_own_hosts_are_accepted(home, host):
    assert certificates.check(home, now(), host=host) == 824


def test_another_authority_is_refused(home, other):
    shutil.copy(certificates.authority_path(other), certificates.authority_path(home))
    assert "must be issued by" in refused(907, certificates.check, home, now())


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_key_that_others_may_read_is_refused(home, mode):
    certificates.key_path(home).chmod(mode)
    said = refused(907, certificates.check, home, now())
    assert "owner only" in said
    assert f"{mode:04o}" in said


@pytest.mark.parametrize("name", ["ca/ca.crt", "tls/server.crt", "tls/server.key"])
@pytest.mark.parametrize("content", [None, b"", b"junk", b"\x00" * 70_000], ids=str)
def test_a_missing_or_damaged_file_is_named(home, name, content):
    path = home / name
    path.unlink() if content is None else path.write_bytes(content)
    assert name in refused(907, certificates.check, home, now())
