from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedge.edge.serving.credentials import Address, address, credentials
from fedge.edge.serving.server import InferenceServer
from fedge.edge.serving.service import Service
from fedge.edge.serving.usage_counters import Counts
from fedge.shared.errors import DeployError

READY = "/inference.GRPCInferenceService/ServerReady"
DAY = datetime.timedelta(days=1)


@dataclass
class Party:
    """A certificate and its key, in files."""

    certificate: Path
    key: Path
    own: x509.Certificate
    secret: ec.EllipticCurvePrivateKey


@pytest.fixture
def issue(tmp_path: Path) -> Callable[..., Party]:
    def make(name: str, by: Party | None = None, days: int = 1) -> Party:
        secret = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        begin = datetime.datetime.now(datetime.UTC) - 2 * DAY
        hosts = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        own = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(by.own.subject if by else subject)
            .public_key(secret.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + (2 + days) * DAY)
            .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
            .sign(by.secret if by else secret, hashes.SHA256())
        )
        found = Party(tmp_path / f"{name}.crt", tmp_path / f"{name}.key", own, secret)
        found.certificate.write_bytes(own.public_bytes(Encoding.PEM))
        found.key.write_bytes(
            secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        found.key.chmod(0o600)
        return found

    return make


@pytest.fixture
def secured(running: Callable[..., Any], image_bundle: Path) -> Any:
    """Starts a TLS server; they end with the test."""
    started = []

    def start(server: Party, clients: Party | None = None) -> str:
        served = running(image_bundle).load()
        tls = credentials(server.certificate, server.key, clients and clients.certificate)
        service = Service(served, 10.0, Counts())
        started.append(
            InferenceServer(service, Address("0.0.0.0", 0), tls, max_bytes=10**6, in_flight=4)  # noqa: S104
        )
        return f"127.0.0.1:{started[-1].address.port}"

    yield start
    for one in started:
        one.stop(2.0)


def ready(where: str, authority: Party, client: Party | None = None) -> bytes:
    own = (client.key.read_bytes(), client.certificate.read_bytes()) if client else (None, None)
    tls = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), *own)
    with grpc.secure_channel(where, tls) as channel:
        return bytes(channel.unary_unary(READY)(b"", timeout=60))


def test_tls_and_plaintext_do_not_mix(secured: Any, issue: Callable[..., Party]) -> None:
    authority = issue("authority")
    where = secured(issue("server", authority))
    assert ready(where, authority) == b"\x08\x01"
    with pytest.raises(grpc.RpcError):
        ready(where, issue("other"))
    with grpc.insecure_channel(where) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary(READY)(b"", timeout=60)


def test_mtls_lets_in_only_clients_of_its_authority(
    secured: Any, issue: Callable[..., Party]
) -> None:
    authority, clients, strangers = issue("authority"), issue("clients"), issue("strangers")
    where = secured(issue("server", authority), clients)
    assert ready(where, authority, issue("client", clients)) == b"\x08\x01"
    for refused in (None, issue("stranger", strangers), issue("late", clients, days=-1)):
        with pytest.raises(grpc.RpcError) as caught:
            ready(where, authority, refused)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_invalid_credentials_are_refused(tmp_path: Path, issue: Callable[..., Party]) -> None:
    good, other, old = issue("good"), issue("other"), issue("old", days=-1)
    text = tmp_path / "text"
    text.write_text("no PEM")
    text.chmod(0o600)
    open_key = issue("open")
    open_key.key.chmod(0o640)
    large = tmp_path / "large"
    large.write_bytes(b"x" * (2**18 + 1))
    missing = tmp_path / "missing"
    assert credentials(None, None, None) is None
    assert credentials(good.certificate, good.key, other.certificate) is not None
    for certificate, key, clients, message in (
        (good.certificate, None, None, "--tls-cert and --tls-key: must be given together"),
        (None, good.key, None, "must be given together"),
        (None, None, good.certificate, "--client-ca: must come with"),
        (missing, good.key, None, "--tls-cert: .* cannot be read"),
        (good.certificate, missing, None, "--tls-key: .* cannot be read"),
        (tmp_path, good.key, None, "regular file"),
        (large, good.key, None, "at most 262144 bytes"),
        (text, good.key, None, "--tls-cert: must hold certificates in PEM"),
        (good.certificate, text, None, "--tls-key: must be a private key in PEM"),
        (good.certificate, other.key, None, "must be the key of --tls-cert"),
        (old.certificate, old.key, None, "--tls-cert: must be valid now"),
        (open_key.certificate, open_key.key, None, "got mode 0640"),
        (good.certificate, good.key, text, "--client-ca: must hold certificates in PEM"),
    ):
        with pytest.raises(DeployError, match=message) as caught:
            credentials(certificate, key, clients)
        assert caught.value.code == 920


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("127.0.0.1:8001", True),
        ("127.8.0.1:0", True),
        ("[::1]:8001", True),
        ("localhost:8001", True),
        ("0.0.0.0:8001", False),
        ("[::]:65535", False),
        ("192.0.2.1:1", False),
    ],
)
def test_addresses(text: str, loopback: bool) -> None:
    found = address(text, "--listen")
    assert str(found) == text
    assert found.loopback is loopback


@pytest.mark.parametrize(
    "text", ["", "8001", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "a.example:1", ":1", "1:²"]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(DeployError, match="--listen: must be an IP address") as caught:
        address(text, "--listen")
    assert caught.value.code == 904


def test_others_are_not_served_without_tls(running: Callable[..., Any], image_bundle: Path) -> None:
    server = running(image_bundle)
    options: dict[str, Any] = {"max_bytes": 10**6, "in_flight": 4}
    everywhere = Address("0.0.0.0", 0)  # noqa: S104
    with pytest.raises(DeployError, match="--listen: must be a loopback address") as caught:
        InferenceServer(server.service, everywhere, None, **options)
    assert caught.value.code == 920
    InferenceServer(server.service, everywhere, None, insecure=True, **options).stop(1.0)


def test_a_taken_port_is_904(running: Callable[..., Any], image_bundle: Path) -> None:
    server = running(image_bundle)
    with pytest.raises(DeployError, match="must be free") as caught:
        InferenceServer(server.service, server.server.address, None, max_bytes=10**6, in_flight=4)
    assert caught.value.code == 904
