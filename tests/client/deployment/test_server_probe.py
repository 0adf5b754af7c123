"""Whether the server can be reached, asked of real TLS servers on loopback: good, strange, old, absent, silent."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedge.client.deployment import server_probe
from fedge.shared.errors import DeployError


class Authority:
    """Issues certificates for 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        self.folder, self.path = folder, folder / "ca.crt"
        self._certificate = self._signed(self._name, self._key.public_key(), 365, authority=True)
        self._write(self.path, self._certificate)

    def issue(self, days: float, host: str = "127.0.0.1") -> ssl.SSLContext:
        """A server's context with a certificate that ends in ``days``."""
        import ipaddress

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        where = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
        crt, pem = self.folder / "server.crt", self.folder / "server.key"
        self._write(crt, self._signed(name, key.public_key(), days, names=where))
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(crt, pem)
        return context

    def _signed(
        self,
        name: x509.Name,
        key: ec.EllipticCurvePublicKey,
        days: float,
        *,
        authority: bool = False,
        names: x509.SubjectAlternativeName | None = None,
    ) -> x509.Certificate:
        end = datetime.now(UTC) + timedelta(days=days)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(datetime.now(UTC), end) - timedelta(days=30))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@contextmanager
def serving(context: ssl.SSLContext | None) -> Iterator[str]:
    """A server that shakes hands; without a context it accepts and says nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                taken.append(connection)
                if context is not None:
                    with suppress(OSError), warnings.catch_warnings():
                        taken.append(context.wrap_socket(connection, server_side=True))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in taken:
            connection.close()


def test_a_good_server_and_the_days_of_its_certificate(authority: Authority) -> None:
    with serving(authority.issue(days=20.5)) as address:
        found = server_probe.check(address, authority.path)
    assert found["reachable"] is True
    assert found["problem"] == ""
    assert found["days_left"] == 20
    assert abs(found["at"] - time.time()) < 60


def test_a_server_of_another_authority(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    with serving(other.issue(days=20)) as address:
        found = server_probe.check(address, authority.path)
    assert found["reachable"] is False
    assert found["problem"].startswith("FE-907 certificate: ")
    assert found["days_left"] is None


def test_a_certificate_that_has_ended(authority: Authority) -> None:
    with serving(authority.issue(days=-1)) as address:
        found = server_probe.check(address, authority.path)
    assert found["reachable"] is False
    assert "expired" in found["problem"]


def test_a_certificate_for_another_host(authority: Authority) -> None:
    with serving(authority.issue(days=20, host="127.0.0.2")) as address:
        found = server_probe.check(address, authority.path)
    assert found["reachable"] is False
    assert "127.0.0.1" in found["problem"]


def test_nobody_there(authority: Authority) -> None:
    with socket.socket() as held:  # a port that nobody else can take meanwhile
        held.bind(("127.0.0.1", 0))
        found = server_probe.check(f"127.0.0.1:{held.getsockname()[1]}", authority.path)
    assert found["reachable"] is False
    assert found["problem"].startswith("FE-912 ")
    assert "refused" in found["problem"].lower()


def test_a_name_that_nobody_knows(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_probe, "TIMEOUT", 2.0)
    found = server_probe.check("no-such-host.invalid:443", authority.path)
    assert found["reachable"] is False
    assert found["problem"]


@pytest.mark.slow
def test_a_server_that_says_nothing_takes_no_longer_than_the_deadline(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_probe, "TIMEOUT", 0.5)
    with serving(None) as address:
        started = time.monotonic()
        found = server_probe.check(address, authority.path)
    assert time.monotonic() - started < 30
    assert found["reachable"] is False
    assert "timed out" in found["problem"]


def test_a_server_that_speaks_something_else(authority: Authority) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            with suppress(OSError):
                connection.recv(4096)

    thread = threading.Thread(target=serve)
    thread.start()
    found = server_probe.check(f"127.0.0.1:{listener.getsockname()[1]}", authority.path)
    thread.join()
    listener.close()
    assert found["reachable"] is False
    assert found["problem"]


@pytest.mark.parametrize("text", [None, "no certificate"])
def test_an_authority_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "ca.crt").write_text(text)
    found = server_probe.check("127.0.0.1:9", tmp_path / "ca.crt")
    assert found["reachable"] is False
    assert found["problem"]


def test_an_address_that_is_none(authority: Authority) -> None:
    with pytest.raises(DeployError):
        server_probe.check("127.0.0.1", authority.path)


def test_the_result_is_left_as_a_whole(authority: Authority, tmp_path: Path) -> None:
    path = tmp_path / "link.json"
    with serving(authority.issue(days=20)) as address:
        server_probe.write(address, authority.path, path)
    found = json.loads(path.read_text())
    assert found["reachable"] is True
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
