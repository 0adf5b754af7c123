"""Certificate building: an authority of the server's own, and certificates for a server's names.

No file is read or written here; the clock and random numbers are used. X.509 as RFC 5280 has it, with the
extensions that strict verifiers require: both key identifiers, key usage, the hosts as alternative names.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedge.shared.errors import DeployError

#: Days that the authority lasts.
AUTHORITY_DAYS: Final = 3650
#: Days that a server certificate lasts; some clients refuse more than 825.
SERVER_DAYS: Final = 825
#: Largest number of names and addresses in one certificate.
MAX_HOSTS: Final = 100
#: In every certificate: the SuperLink behind the reverse proxy uses the same one.
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")

_LABEL: Final = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DNS_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
# A clock that is a little slow at a site must not refuse a new certificate.
_BACKDATED: Final = timedelta(hours=1)


def subject_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Subject names for DNS names and IP addresses and for loopback, each once, in order.

    Raises:
        DeployError: 904, too many hosts, or one that is neither a DNS name nor an IP address.
    """
    if len(hosts) > MAX_HOSTS:
        raise DeployError(904, f"hosts: must be at most {MAX_HOSTS}, got {len(hosts)}")
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys((*hosts, *LOOPBACK)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
            continue
        except ValueError:
            pass
        # Only digits and dots, but no address: a typing error.
        if _DNS_NAME.fullmatch(host) is None or re.fullmatch(r"[0-9.]+", host):
            raise DeployError(904, f"host: must be a DNS name or an IP address, got {host[:80]!r}")
        names.append(x509.DNSName(host.lower()))
    return list(dict.fromkeys(names))


def authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """A self-signed authority that can issue server certificates, and no further authority."""
    now = _now()
    # A random number in its name distinguishes two authorities of one site.
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"fedge authority {secrets.token_hex(4)}")]
    )
    return (
        _builder(name, name, key.public_key(), key.public_key())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def issue(
    public: ec.EllipticCurvePublicKey,
    names: Sequence[x509.GeneralName],
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    """A server certificate for ``public``, by an authority.

    Args:
        public: the server's public key.
        names: as ``subject_names`` returns them.
        issuer: the authority's certificate.
        issuer_key: the authority's private key.
        days: how long it lasts, at most as long as the authority.

    Raises:
        DeployError: 907, fewer days than one, or an expired authority.
    """
    if days < 1:
        raise DeployError(907, f"days: must be at least 1, got {days}")
    now = _now()
    end = min(now + timedelta(days=days), issuer.not_valid_after_utc)
    if end <= now:
        raise DeployError(907, f"the authority: must be valid now, got one until {end:%F %R}")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedge server")])
    return (
        _builder(subject, issuer.subject, public, issuer_key.public_key())
        .not_valid_before(max(now - _BACKDATED, issuer.not_valid_before_utc))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(issuer_key, hashes.SHA384())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False
        )
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


__all__ = [
    "AUTHORITY_DAYS",
    "LOOPBACK",
    "MAX_HOSTS",
    "SERVER_DAYS",
    "authority",
    "issue",
    "subject_names",
]
