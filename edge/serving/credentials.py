"""Listening addresses and TLS credentials, validated before the server listens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from fedge.shared.errors import DeployError
from fedge.shared.files import mode_for_others, open_regular, read_exactly, reason

_FILE_LIMIT: Final = 2**18


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: an IP address, or ``localhost``.
        port: 0 for any that is free.
    """

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str, option: str) -> Address:
    """Read ``host:port`` or ``[v6]:port``.

    Args:
        text: value of the option.
        option: its name, for messages.

    Raises:
        DeployError: 904, it is something else; names other than localhost are not resolved.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    try:
        if host != "localhost":
            ipaddress.ip_address(host)
        if not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise ValueError("port")
    except ValueError:
        raise DeployError(
            904, f"{option}: must be an IP address or localhost, and a port, got {text[:80]!r}"
        ) from None
    return Address(host, int(port))


def credentials(
    certificate: Path | None, key: Path | None, client_authority: Path | None
) -> Any | None:
    """Credentials for ``grpc.Server.add_secure_port``; None without TLS.

    Args:
        certificate: PEM, the server's own first, then the intermediate ones.
        key: PEM of its private key, without a password, readable by its owner alone.
        client_authority: PEM of the authorities that must have signed a client's certificate; None lets in any client.

    Raises:
        DeployError: 920, one is missing, cannot be read, or does not match the others.
    """
    if certificate is None and key is None:
        if client_authority is not None:
            raise DeployError(920, "--client-ca: must come with --tls-cert and --tls-key")
        return None
    if certificate is None or key is None:
        raise DeployError(920, "--tls-cert and --tls-key: must be given together, got one")
    chain, secret = _read(certificate, "--tls-cert"), _read(key, "--tls-key", secret=True)
    own = _certificates(chain, "--tls-cert")[0]
    now = datetime.now(UTC)
    if not own.not_valid_before_utc <= now <= own.not_valid_after_utc:
        until = own.not_valid_after_utc.date()
        raise DeployError(920, f"--tls-cert: must be valid now, got one until {until}")
    try:
        public = load_pem_private_key(secret, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise DeployError(
            920, "--tls-key: must be a private key in PEM without a password, got something else"
        ) from None
    if _spki(public) != _spki(own.public_key()):
        raise DeployError(920, "--tls-key: must be the key of --tls-cert, got another")
    roots = None
    if client_authority is not None:
        roots = _read(client_authority, "--client-ca")
        _certificates(roots, "--client-ca")
    return grpc.ssl_server_credentials([(secret, chain)], roots, roots is not None)


def _spki(key: Any) -> bytes:
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _certificates(data: bytes, option: str) -> list[x509.Certificate]:
    try:
        certificates = x509.load_pem_x509_certificates(data)
    except (ValueError, UnsupportedAlgorithm):
        certificates = []
    if not certificates:
        raise DeployError(920, f"{option}: must hold certificates in PEM, got something else")
    return certificates


def _read(path: Path, option: str, *, secret: bool = False) -> bytes:
    try:
        file, size = open_regular(path)
        with file:
            mode = mode_for_others(path)
            data = read_exactly(file, _FILE_LIMIT + 1)
    except OSError as error:
        raise DeployError(920, f"{option}: {path} cannot be read ({reason(error)})") from None
    if len(data) > _FILE_LIMIT:
        raise DeployError(920, f"{option}: must be at most {_FILE_LIMIT} bytes, got {size}")
    if secret and mode:
        raise DeployError(
            920, f"{option}: must be readable by its owner alone (chmod 600), got mode {mode:04o}"
        )
    return data
