"""The site registry: the admitted sites, one public key for each, in ``home/sites/NAME.pub``.

Only the operator writes it. Flower's own list is filled from it whenever the server starts, so it survives the loss of
Flower's database.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from fedge.shared.errors import DeployError, SiteError
from fedge.shared.files import flush_folder, read_bounded, reason, take_lock, write_atomically
from fedge.shared.protocol import SITE_NAME

#: Largest number of sites that one server admits.
MAX_SITES: Final = 10_000

# An EC P-384 key in OpenSSH's format takes about 210 bytes, and a comment may follow.
_FILE_LIMIT: Final = 4096
#: Seconds to wait for another command that changes the registry.
_LOCK_TIMEOUT: Final = 10.0


def admit(home: Path, name: str, key_file: Path) -> Path:
    """Admit a site.

    Args:
        home: of the server.
        name: of the site.
        key_file: the ``site.pub`` that the site generated.

    Returns:
        Path of the copy in the registry.

    Raises:
        SiteError: 412, the name does not follow the rule for names.
        DeployError: 908, the file holds no EC P-384 public key; 916, the name is taken, or the key is
            another site's; 902, another command holds the registry; 901, it cannot be written.
    """
    _check_name(name)
    line = _read(key_file)
    with _locked(home):
        keys = site_keys(home)
        if name in keys:
            raise DeployError(
                916, f"site {name}: must not be admitted yet, got a second key for it"
            )
        for other, path in keys.items():
            if _read(path) == line:
                raise DeployError(
                    916, f"site {name}: must bring a key of its own, got the key of site {other}"
                )
        if len(keys) >= MAX_SITES:
            raise DeployError(916, f"site {name}: must be one of at most {MAX_SITES} sites")
        path = _folder(home) / f"{name}.pub"
        try:
            write_atomically(path, line + b"\n")
        except OSError as error:
            raise DeployError(901, f"{path}: cannot be written ({reason(error)})") from None
    return path


def expel(home: Path, name: str) -> None:
    """Remove a site from the registry.

    Raises:
        SiteError: 412, the name does not follow the rule for names.
        DeployError: 913, no such site; 902, another command holds the registry; 901, it cannot be
            written.
    """
    _check_name(name)
    with _locked(home):
        try:
            (_folder(home) / f"{name}.pub").unlink()
            flush_folder(_folder(home))
        except FileNotFoundError:
            raise DeployError(913, f"site {name}: must be admitted, got no such site") from None
        except OSError as error:
            raise DeployError(
                901, f"{_folder(home)}: cannot be written ({reason(error)})"
            ) from None


def site_keys(home: Path) -> dict[str, Path]:
    """The path of every admitted site's public key, by name, in order of names.

    Raises:
        DeployError: 901, the folder cannot be read; 908, it holds a file that is not a site's key.
    """
    folder = _folder(home)
    keys: dict[str, Path] = {}
    try:
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        return keys
    except OSError as error:
        raise DeployError(901, f"{folder}: cannot be read ({reason(error)})") from None
    for path in sorted(entries, key=lambda path: path.stem):
        if path.suffix != ".pub" or re.fullmatch(SITE_NAME, path.stem) is None:
            raise DeployError(908, f"{path}: must be named after a site, as NAME.pub")
        _read(path)
        keys[path.stem] = path
    return keys


def _folder(home: Path) -> Path:
    return home / "sites"


def _check_name(name: str) -> None:
    if re.fullmatch(SITE_NAME, name) is None or "\n" in name:
        raise SiteError(412, f"site name: must match {SITE_NAME}, got {name[:80]!r}")


def _read(path: Path) -> bytes:
    """The one key in a file, in one spelling, without its comment."""
    try:
        data = read_bounded(path, _FILE_LIMIT)
    except OSError as error:
        raise DeployError(908, f"{path}: cannot be read ({reason(error)})") from None
    if b"PRIVATE KEY" in data:
        raise DeployError(908, f"{path}: must hold a public key, got a private one; keep it secret")
    if len(data.strip().splitlines()) != 1:
        raise DeployError(908, f"{path}: must hold one public key on one line")
    try:
        key = load_ssh_public_key(data.strip())
    except (ValueError, UnsupportedAlgorithm):
        raise DeployError(908, f"{path}: must hold a public key in OpenSSH's format") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise DeployError(908, f"{path}: must hold an EC P-384 key, got another kind")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Lock the registry, so that one key cannot be admitted under two names at the same time."""
    folder = _folder(home)
    try:
        folder.mkdir(mode=0o700, parents=False, exist_ok=True)
        lock = take_lock(folder / ".lock", timeout=_LOCK_TIMEOUT)
    except BlockingIOError:
        raise DeployError(902, f"{folder}: held by another command") from None
    except OSError as error:
        raise DeployError(901, f"{folder}: cannot be written ({reason(error)})") from None
    with lock:
        yield


__all__ = ["MAX_SITES", "admit", "expel", "site_keys"]
