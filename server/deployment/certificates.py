"""The server's own certificate authority, and the certificate that it presents to sites.

Sites trust this authority and no other, so they refuse a certificate that a public authority issued to another host.
``ca/`` and ``tls/`` appear whole or not at all: each is filled beside its place and then renamed.

    home/ca/ca.key       EC P-384, mode 0600; needed for renewal only
    home/ca/ca.crt       what every site gets; ten years
    home/tls/server.key  EC P-384, mode 0600
    home/tls/server.crt  for the server's names and addresses, and always for loopback
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedge.server.deployment.x509 import (
    AUTHORITY_DAYS,
    SERVER_DAYS,
    authority,
    issue,
    subject_names,
)
from fedge.shared.crypto.key_files import load_elliptic_curve
from fedge.shared.errors import DeployError
from fedge.shared.files import flush_folder, read_bounded, reason, write_atomically

#: Days before the end from which ``warning`` gives a text.
WARN_DAYS: Final = 30

_FILE_LIMIT: Final = 64 * 1024


def authority_path(home: Path) -> Path:
    """The authority's certificate, which every site needs."""
    return home / "ca" / "ca.crt"


def certificate_path(home: Path) -> Path:
    """The server's certificate."""
    return home / "tls" / "server.crt"


def key_path(home: Path) -> Path:
    """The private key of the server's certificate."""
    return home / "tls" / "server.key"


def create(home: Path, hosts: Sequence[str], *, days: int = SERVER_DAYS) -> None:
    """Make an authority and a server certificate in ``home``.

    A creation that was killed after the authority is finished by the next call, with that authority.

    Args:
        home: the server's home; it is made where it is missing.
        hosts: DNS names and IP addresses by which sites reach the server; loopback is always added.
        days: how long the server certificate lasts, at most as long as the authority.

    Raises:
        DeployError: 903, there is a certificate already; 904, a host is neither a DNS name nor an IP
            address; 907, the authority that is there is not usable, or nothing can be written.
    """
    names = subject_names(hosts)
    tls = certificate_path(home).parent
    if tls.is_dir() and any(tls.iterdir()):
        raise DeployError(903, f"{tls}: must not exist yet")
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "ca").exists():
            key = ec.generate_private_key(ec.SECP384R1())
            _publish(home / "ca", {"ca.key": _private(key), "ca.crt": _pem(authority(key))})
        issuer, issuer_key = _load_authority(home)
        key = ec.generate_private_key(ec.SECP384R1())
        issued = issue(key.public_key(), names, issuer, issuer_key, days)
        _publish(tls, {"server.key": _private(key), "server.crt": _pem(issued)})
    except OSError as error:
        raise DeployError(907, f"{home}: cannot be written ({reason(error)})") from None


def renew(home: Path, *, days: int = SERVER_DAYS, new_key: bool = False) -> None:
    """Replace the server certificate by a new one of the same authority, for the same names.

    Sites need nothing new. The server presents it after a restart.

    Args:
        home: the server's home.
        days: how long the new certificate lasts, at most as long as the authority.
        new_key: make a new private key too. These are two files: a kill between them leaves a pair
            that ``check`` refuses, and another renewal with ``new_key`` repairs it.

    Raises:
        DeployError: 907, the authority, the certificate or the key that is there is not usable.
    """
    issuer, issuer_key = _load_authority(home)
    names = list(_subject_names(_load_certificate(certificate_path(home)), home))
    key = ec.generate_private_key(ec.SECP384R1()) if new_key else _load_key(key_path(home))
    issued = issue(key.public_key(), names, issuer, issuer_key, days)
    try:
        if new_key:
            # Only this user can enter the folder, so the key is private also in the moment before chmod.
            certificate_path(home).parent.chmod(0o700)
            write_atomically(key_path(home), _private(key))
            key_path(home).chmod(0o600)
        write_atomically(certificate_path(home), _pem(issued))
    except OSError as error:
        raise DeployError(907, f"{home}: cannot be written ({reason(error)})") from None


def check(home: Path, now: datetime, *, host: str | None = None) -> int:
    """Check that the server's certificate can be served at ``now``.

    Args:
        home: the server's home.
        now: the time, with its zone.
        host: the name or address that sites use, where it is to be checked too.

    Returns:
        Whole days until the certificate or its authority ends, whichever is first; see ``warning``.

    Raises:
        DeployError: 907, with the file and what is wrong with it: missing, unreadable, a private key
            that others may read, expired, not yet valid, not from this authority, not for ``host``,
            not the key's.
    """
    issuer = _load_certificate(authority_path(home))
    certificate = _load_certificate(certificate_path(home))
    key = _load_key(key_path(home))
    for path, one in ((authority_path(home), issuer), (certificate_path(home), certificate)):
        if now < one.not_valid_before_utc:
            raise DeployError(
                907, f"{path}: must be valid now, got one from {one.not_valid_before_utc:%F %R}"
            )
        if now >= one.not_valid_after_utc:
            raise DeployError(
                907, f"{path}: must be valid now, got one until {one.not_valid_after_utc:%F %R}"
            )
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        raise DeployError(
            907,
            f"{certificate_path(home)}: must be issued by {authority_path(home)}, got another issuer",
        ) from None
    if certificate.public_key() != key.public_key():
        raise DeployError(907, f"{key_path(home)}: must be the key of {certificate_path(home)}")
    if host is not None:
        names = list(_subject_names(certificate, home))
        if subject_names([host])[0] not in names:
            hosts = ", ".join(str(name.value) for name in names[:20])
            raise DeployError(
                907, f"{certificate_path(home)}: must be for {host}, got one for {hosts}"
            )
    return (min(certificate.not_valid_after_utc, issuer.not_valid_after_utc) - now).days


def warning(days: int) -> str | None:
    """The warning that status shows when the certificate ends within ``WARN_DAYS``, else None.

    Args:
        days: whole days that are left.
    """
    if days >= WARN_DAYS:
        return None
    left = "less than a day" if days < 1 else "1 day" if days == 1 else f"{days} days"
    return f"the server's certificate ends in {left}: run `fedge server renew`, then restart"


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _publish(folder: Path, files: dict[str, bytes]) -> None:
    """Fill a folder that only this user can enter (mode 0700), then give it its name.

    Raises:
        DeployError: 903, a folder of that name appeared meanwhile and is not empty.
    """
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, data in files.items():
            write_atomically(beside / name, data)
            (beside / name).chmod(0o600 if name.endswith(".key") else 0o644)
        try:
            beside.rename(folder)
        except OSError:
            if folder.exists():
                raise DeployError(903, f"{folder}: must not exist yet") from None
            raise
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _load_authority(home: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate = _load_certificate(authority_path(home))
    key = _load_key(home / "ca" / "ca.key")
    if certificate.public_key() != key.public_key():
        raise DeployError(907, f"{home / 'ca' / 'ca.key'}: must be the key of ca.crt beside it")
    return certificate, key


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        data = read_bounded(path, _FILE_LIMIT)
        if data.count(b"-----BEGIN") != 1:
            raise DeployError(907, f"{path}: must hold one certificate in PEM")
        return x509.load_pem_x509_certificate(data)
    except OSError as error:
        raise DeployError(907, f"{path}: cannot be read ({reason(error)})") from None
    except ValueError:
        raise DeployError(907, f"{path}: must hold one certificate in PEM") from None


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        return load_elliptic_curve(path)
    except ValueError as error:
        raise DeployError(907, str(error)) from None


def _subject_names(certificate: x509.Certificate, home: Path) -> x509.SubjectAlternativeName:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        raise DeployError(907, f"{certificate_path(home)}: must name its hosts") from None


__all__ = [
    "AUTHORITY_DAYS",
    "SERVER_DAYS",
    "authority_path",
    "certificate_path",
    "check",
    "create",
    "key_path",
    "renew",
    "warning",
]
