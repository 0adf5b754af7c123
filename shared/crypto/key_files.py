"""Private keys in files: read whole, for their owner alone, and of the one kind that is expected."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from fedge.shared.files import mode_for_others, read_bounded, reason

#: Largest key file that is read, in bytes.
MAX_BYTES: Final = 16 * 1024


def load_ed25519(path: Path, *, owner_only: bool = True) -> Ed25519PrivateKey:
    """Read an Ed25519 key in PEM, without a password.

    Args:
        path: of the file.
        owner_only: refuse a file that others than its owner may use, as a reader of it can sign in its owner's name.

    Raises:
        ValueError: what the file must be, as "PATH: must be X, got Y".
    """
    key = _load(path, "an Ed25519", openssh=False, owner_only=owner_only)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path}: must hold an Ed25519 key, got another kind")
    return key


def load_elliptic_curve(path: Path, *, openssh: bool = False) -> EllipticCurvePrivateKey:
    """Read an elliptic-curve key that its owner alone may use, without a password, in PEM or in OpenSSH's format.

    Raises:
        ValueError: what the file must be, as "PATH: must be X, got Y".
    """
    key = _load(path, "an elliptic-curve", openssh=openssh, owner_only=True)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError(f"{path}: must hold an elliptic-curve key, got another kind")
    return key


def _load(path: Path, name: str, *, openssh: bool, owner_only: bool) -> PrivateKeyTypes:
    try:
        data = read_bounded(path, MAX_BYTES)
        mode = mode_for_others(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({reason(error)})") from None
    if owner_only and mode:
        raise ValueError(f"{path}: must be readable by its owner only, got {mode:04o}")
    load, form = (
        (load_ssh_private_key, "OpenSSH's format") if openssh else (load_pem_private_key, "PEM")
    )
    try:
        return load(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError(
            f"{path}: must hold {name} private key in {form} without a password"
        ) from None
