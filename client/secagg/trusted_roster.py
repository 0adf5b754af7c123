"""A site's own roster: whom it believes, and that it never goes back to an older one.

The home holds ``roster.json``, ``consortium.pub`` (the key that must have signed it), and
``roster-seen.json``, which fedge writes: the highest version that this site used. An older roster
may still hold a key that was revoked since, so a file put back, or kept back by who delivers it,
is refused. ``signing.key`` is the site's own key, whose public half the roster names.
"""

from __future__ import annotations

import re
import threading
from datetime import date
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedge.shared.crypto import dsse
from fedge.shared.crypto.key_files import load_ed25519
from fedge.shared.errors import BundleError, DeployError, FedgeError, ReleaseError, SiteError
from fedge.shared.files import read_bounded, reason, write_atomically
from fedge.shared.roster.roster import MAX_FILE, Roster, open_roster

FILE: Final = "roster.json"
TRUST: Final = "consortium.pub"
SEEN: Final = "roster-seen.json"
KEY: Final = "signing.key"

_NOT_TRUSTED: Final = 421
_UNUSABLE: Final = 917
_OLDER: Final = 918
_NOT_OURS: Final = 919
_SEEN_LIMIT: Final = 4096

_Mark = tuple[tuple[int, int, int, int] | None, ...]


def read(home: Path) -> Roster:
    """Read a home's roster, and remember its version before anybody uses it.

    Raises:
        DeployError: 917, the roster, the consortium's key or the record of versions is missing or
            not usable, or the record cannot be written; 918, the site has used a later version, or
            the same one with other content.
    """
    path = home / FILE
    try:
        trusted = dsse.load_public(home / TRUST)
    except BundleError as error:
        raise DeployError(_UNUSABLE, error.message) from None
    try:
        data = read_bounded(path, MAX_FILE)
    except OSError as error:
        raise DeployError(_UNUSABLE, f"{path}: cannot be read ({reason(error)})") from None
    roster = open_roster(data, trusted)
    _remember(home / SEEN, roster)
    return roster


class RosterFile:
    """A home's roster, read again when it or the consortium's key changes.

    Raises:
        DeployError: 917, the roster is not usable; 918, it is older than one the site has used.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = threading.Lock()
        # Looked at before it is read: a change in between is then seen as one.
        self._seen = self._mark()
        self._roster: Roster | None = read(home)

    def current(self) -> Roster:
        """The roster as the file says now.

        Raises:
            SiteError: 421, the file is gone, not usable, or older than one used before; nobody is
                believed until it is repaired.
        """
        with self._lock:
            mark = self._mark()
            # What failed is tried again each time: a full disk leaves no mark when it has room.
            if self._roster is None or mark != self._seen:
                self._seen, self._roster = mark, None
                try:
                    self._roster = read(self._home)
                except FedgeError as error:
                    raise SiteError(_NOT_TRUSTED, f"{FILE}: must be usable, got {error}") from None
            return self._roster

    def _mark(self) -> _Mark:
        return tuple(_stamp(self._home / name) for name in (FILE, TRUST))


def own_key(home: Path) -> Ed25519PrivateKey:
    """The key by which the roster knows this site.

    Raises:
        ReleaseError: 602, ``signing.key`` cannot be read, holds something else, or is open to other users.
    """
    try:
        return load_ed25519(home / KEY)
    except ValueError as error:
        raise ReleaseError(602, str(error)) from None


def require_own(roster: Roster, site: str, private: Ed25519PrivateKey, today: date) -> None:
    """Check that other sites will believe this one.

    Args:
        roster: this site's.
        site: its own name.
        private: its own key.
        today: in UTC.

    Raises:
        DeployError: 919, the roster does not hold this name with this key, or not as valid today.
    """
    try:
        listed: Ed25519PublicKey = roster.key_of(site, today)
    except SiteError as error:
        entry = roster.sites.get(site)
        # The key alone is taken back, not the site: with another one it can come back.
        more = "; make a new key first" if entry is not None and entry.revoked else ""
        raise DeployError(_NOT_OURS, error.message + more) from None
    found, wanted = dsse.key_id(private.public_key()), dsse.key_id(listed)
    if found != wanted:
        raise DeployError(
            _NOT_OURS,
            f"site {site}: must have the key with the key id {wanted[:16]}… of the roster, got {found[:16]}…",
        )


def _remember(path: Path, roster: Roster) -> None:
    """Refuse a roster older than the recorded one, and record it where it is newer."""
    digest = roster.digest
    seen = _recorded(path)
    if seen is not None:
        version, known = seen
        if roster.version < version:
            raise DeployError(
                _OLDER, f"{FILE}: must be version {version} or later, got {roster.version}"
            )
        if roster.version == version:
            if digest != known:
                raise DeployError(
                    _OLDER,
                    f"{FILE}: must be version {version} with the content {known[:16]}… that this "
                    f"site used, got {digest[:16]}…",
                )
            return
    record = dsse.canonical_json({"sha256": digest, "version": roster.version})
    try:
        write_atomically(path, record)
    except OSError as error:
        raise DeployError(_UNUSABLE, f"{path}: cannot be written ({reason(error)})") from None


def _recorded(path: Path) -> tuple[int, str] | None:
    """The version and the SHA-256 that were used last, None where no roster was."""
    try:
        found: Any = dsse.parse_canonical(read_bounded(path, _SEEN_LIMIT), SEEN)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DeployError(_UNUSABLE, f"{path}: cannot be read ({reason(error)})") from None
    except BundleError as error:
        raise DeployError(_UNUSABLE, error.message) from None
    match found:
        case {"sha256": str(digest), "version": int(version), **rest} if (
            not rest and version is not True and re.fullmatch(r"[0-9a-f]{64}", digest)
        ):
            return version, digest
    raise DeployError(_UNUSABLE, f"{path}: must hold a version and a SHA-256, got something else")


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


__all__ = ["FILE", "KEY", "RosterFile", "SEEN", "TRUST", "own_key", "read", "require_own"]
