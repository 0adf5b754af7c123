"""The key that identifies a site to the server: EC P-384 in OpenSSH's formats, as Flower reads it.

The private half never leaves the site; ``site.pub`` is what the server's operator admits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_public_key,
)

from fedge.shared.crypto.key_files import load_elliptic_curve
from fedge.shared.errors import DeployError
from fedge.shared.files import flush_folder, read_bounded, reason, write_atomically

PRIVATE_NAME: Final = "site.key"
PUBLIC_NAME: Final = "site.pub"

_FILE_LIMIT: Final = 16 * 1024


def create(home: Path) -> Path:
    """Create ``site.key`` (mode 0600) and ``site.pub`` in ``home``.

    A creation that was killed after the private key is finished by the next call, with that key.

    Returns:
        The path of the public key.

    Raises:
        DeployError: 903, both exist already; 908, an existing private key is not usable, or
            a file cannot be written.
    """
    private, public = home / PRIVATE_NAME, home / PUBLIC_NAME
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not private.exists() and not private.is_symlink():
            _place(private, _private(ec.generate_private_key(ec.SECP384R1())))
        elif public.exists():
            raise DeployError(903, f"{private}: must not exist yet")
        write_atomically(public, _public(_load(private)) + b"\n")
        public.chmod(0o644)
    except FileExistsError:
        raise DeployError(903, f"{private}: must not exist yet") from None
    except OSError as error:
        raise DeployError(908, f"{private}: cannot be written ({reason(error)})") from None
    return public


def check(path: Path) -> None:
    """Check that the private key at ``path`` is usable, and that the public key beside it belongs to it.

    Raises:
        DeployError: 908, with the file and what is wrong with it: missing, readable by others,
            another kind of key, a public key of another pair.
    """
    key = _load(path)
    public = path.with_suffix(".pub")
    try:
        stored = load_ssh_public_key(read_bounded(public, _FILE_LIMIT))
    except OSError as error:
        raise DeployError(908, f"{public}: cannot be read ({reason(error)})") from None
    except (ValueError, UnsupportedAlgorithm):
        raise DeployError(908, f"{public}: must hold a public key in OpenSSH's format") from None
    if stored != key.public_key():
        raise DeployError(908, f"{public}: must be the public key of {path}, got another one")


def _place(path: Path, data: bytes) -> None:
    """Write a file atomically, readable by its owner only, without replacing an existing one.

    Raises:
        FileExistsError: ``path`` exists.
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, fails where the name is taken.
        path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def _load(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_elliptic_curve(path, openssh=True)
    except ValueError as error:
        raise DeployError(908, str(error)) from None
    if not isinstance(key.curve, ec.SECP384R1):
        raise DeployError(908, f"{path}: must hold an EC P-384 key, got another kind")
    return key


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


__all__ = ["PRIVATE_NAME", "PUBLIC_NAME", "check", "create"]
