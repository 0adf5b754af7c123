"""The folder of an installation: bundles and engines in numbered folders, and the record that names the one in use.

DIR/installed.json is replaced last and in one step, so that a process that opens DIR finds the old installation or
the new one. The previous one stays, as another process may be reading it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedge.edge.installation.record import BUNDLE, FILE, DeviceRecord, read_record
from fedge.shared.bundle.bundle import Bundle, open_bundle
from fedge.shared.errors import BundleError

DIGITS: Final = 6

_log = logging.getLogger(__name__)


def open_installed(path: Path, trusted: Ed25519PublicKey) -> tuple[Bundle, DeviceRecord | None]:
    """Open a bundle file, or the bundle of an installation.

    Args:
        path: a .fedge file, or a folder of `fedge-edge install`.
        trusted: public key that must have signed it.

    Returns:
        The bundle, verified, and the record of the installation. That is None for a file, and where the record is
        damaged (711, which is logged): then the newest bundle of the folder that verifies is taken.

    Raises:
        BundleError: 701 to 706, as ``open_bundle``; 711, the record is damaged and no bundle verifies.
    """
    folders = slots(path)
    if not folders and not (path / FILE).exists():
        return open_bundle(path, trusted), None
    try:
        record = read_record(path)
    except BundleError as error:
        for folder in reversed(folders):
            try:
                bundle = open_bundle(folder / BUNDLE, trusted)
            except BundleError:
                continue
            _log.warning("%s %s; goes on without the record", error.label, error.message)
            return bundle, None
        raise
    return open_bundle(record.folder / BUNDLE, trusted), record


def source(path: Path) -> Path:
    """The bundle's file: the path itself, or the bundle in use of the installation in that folder.

    Raises:
        BundleError: 711, the installation's record is damaged.
    """
    return read_record(path).folder / BUNDLE if (path / FILE).exists() else path


def watched(path: Path) -> Path:
    """The file to watch for a new bundle: the bundle itself, or the installation's record."""
    return path / FILE if path.is_dir() else path


def slots(path: Path) -> list[Path]:
    """The numbered folders of an installation, oldest first; none where there is no such folder."""
    try:
        folders = [p for p in path.iterdir() if len(p.name) == DIGITS and p.name.isdecimal()]
    except OSError:
        return []
    return sorted(p for p in folders if p.is_dir())
