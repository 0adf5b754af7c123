"""The privacy ledger's files: an empty ledger, its links, and the marker beside it.

The marker holds the ledger's name, the number of its charges and the hash of the newest. It is written after each
charge, so a ledger that lacks what the marker holds is an older copy. A marker of an earlier fedge holds the name only.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from fedge.shared.crypto.dsse import canonical_json
from fedge.shared.errors import SiteError
from fedge.shared.files import open_regular, read_bounded, read_exactly, reason, write_atomically

MARKER_SUFFIX: Final = ".made"

_UNRELIABLE: Final = 428
_APPLICATION_ID: Final = 0x66706C31  # "fpl1"
_VERSION: Final = 1
_HEADER: Final = 100
_MARKER_LIMIT: Final = 128
_MARKER: Final = re.compile(rb"([0-9a-f]{32})(?: (0|[1-9][0-9]{0,17}) ([0-9a-f]{64}))?\n")

# The record is kept as the text that was hashed, so that verifying ten thousand takes a moment.
SCHEMA: Final = (
    "CREATE TABLE charge (id INTEGER PRIMARY KEY, record TEXT NOT NULL, hash TEXT NOT NULL) STRICT",
    "CREATE TABLE meta (one INTEGER PRIMARY KEY CHECK (one = 1), ledger TEXT NOT NULL, charges INTEGER NOT NULL, "
    "head TEXT NOT NULL) STRICT",
)


class Marker(NamedTuple):
    """What the marker says: the ledger's name, its number of charges, and the chain's head.

    ``head`` is empty where an earlier fedge wrote it, which kept the name only.
    """

    name: str
    charges: int
    head: str


def marker_of(path: Path) -> Path:
    """The marker of the ledger at ``path``."""
    return path.with_name(path.name + MARKER_SUFFIX)


def read_marker(path: Path) -> Marker | None:
    """The marker of the ledger at ``path``; None where there is none.

    Raises:
        SiteError: 428, it is no marker.
        OSError: it cannot be read.
    """
    try:
        match = _MARKER.fullmatch(read_bounded(marker_of(path), _MARKER_LIMIT))
    except FileNotFoundError:
        return None
    if match is None:
        refuse(path, "must be the ledger that was made here, got another one or a damaged marker")
    name, charges, head = match.groups(default=b"")
    return Marker(name.decode(), int(charges or 0), head.decode())


def write_marker(path: Path, marker: Marker) -> None:
    """Make the marker say this, durably. Only under the ledger's write lock, so that it never goes back."""
    if read_marker(path) != marker:
        text = f"{marker.name} {marker.charges} {marker.head}\n"
        write_atomically(marker_of(path), text.encode())


def check_not_older(path: Path, marker: Marker | None, start: str, hashes: Sequence[str]) -> None:
    """Hold the chain against what the marker says of it; a ledger that is ahead of its marker is sound.

    Raises:
        SiteError: 428, the ledger lacks charges, others were made in their place, or nothing tells, as with a copy
            on a new disk.
    """
    count = len(hashes)
    if marker is None:
        # A new ledger has its marker before its first charge; without any it was killed while it was created.
        if count:
            refuse(path, f"must have {marker_of(path).name} beside it, got a copy without it")
        return
    if not marker.head:
        return
    must = f"must hold charge {marker.charges} with hash {marker.head}"
    if marker.charges > count:
        refuse(path, f"{must}, got an older copy with {count} charges")
    if [start, *hashes][marker.charges] != marker.head:
        refuse(path, f"{must}, got another one: an older copy that was charged elsewhere")


def check_header(path: Path) -> None:
    """See that the file is a ledger, by hand, as SQLite may write to a file of whatever program when it opens it.

    Raises:
        SiteError: 428, it is not.
        OSError: it cannot be read.
    """
    if path.is_symlink():
        refuse(path, "must be a file, got a symbolic link")
    file, _ = open_regular(path)
    with file:
        header = read_exactly(file, _HEADER)
    version, application = (int.from_bytes(header[at : at + 4]) for at in (60, 68))
    if not header.startswith(b"SQLite format 3\0") or application != _APPLICATION_ID:
        refuse(path, "must be a privacy ledger, got another or a damaged file")
    if version != _VERSION:
        newer = " of a newer fedge" if version > _VERSION else ""
        refuse(path, f"must be of version {_VERSION}, got {version}{newer}")


def fill(path: str) -> None:
    """Make an empty ledger of a file that is empty; closed, all of it is in the one file."""
    name = secrets.token_hex(16)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {_VERSION}")
        for sql in SCHEMA:
            db.execute(sql)
        db.execute("INSERT INTO meta VALUES (1, ?, 0, ?)", (name, start_of(name)))


def link(previous: str, record: bytes) -> str:
    """The chain's next hash: SHA-256(previous || record)."""
    return hashlib.sha256(bytes.fromhex(previous) + record).hexdigest()


def start_of(name: str) -> str:
    """The chain's beginning: SHA-256 over the ledger's name."""
    return hashlib.sha256(canonical_json({"ledger": name})).hexdigest()


def brief(error: Exception) -> str:
    """An error in a few words."""
    return reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"[:160]


def refuse(path: Path, problem: str) -> NoReturn:
    """Say that the ledger cannot be relied on.

    Raises:
        SiteError: 428, always.
    """
    raise SiteError(_UNRELIABLE, f"{path}: {problem}") from None
