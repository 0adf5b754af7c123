"""What the privacy ledger holds, read and written: its records, and the charges that they stand for."""

from __future__ import annotations

import json
import math
import secrets
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

from fedge.shared.crypto.dsse import canonical_json
from fedge.shared.privacy.accounting.adversaries import part_of
from fedge.shared.privacy.accounting.charges import OF_CHARGE, Charge, Entry, Spent
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger.files import SCHEMA, Marker, link, refuse, start_of

Record: TypeAlias = dict[str, Any]
_SALT_BYTES: Final = 16


@dataclass(frozen=True)
class Book:
    """All charges in one snapshot, verified; hashes are of the chain, ``start`` the one before the first."""

    name: str
    records: list[Record]
    hashes: list[str]
    start: str

    @property
    def head(self) -> str:
        """The chain's newest hash."""
        return self.hashes[-1] if self.hashes else self.start


def _record(number: int, charge: Charge, spent: Spent, delta: float) -> Record:
    """What is hashed; JSON has no infinity, for which a text stands."""
    values = {name: getattr(charge, name) for name in OF_CHARGE}
    noise_multiplier, sampling_rate, fixed_size, steps = part_of(charge.release)
    return values | {
        "id": number,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "noise_multiplier": float(noise_multiplier),
        "sampling_rate": float(sampling_rate),
        "fixed_size": fixed_size,
        "steps": steps,
        "epsilon_consumers": _finite(spent.consumers),
        "epsilon_server": _finite(spent.server),
        "epsilon_delta": delta,
        # The hash leaves the site, and all else in here can be guessed: the sampling rate tells the number of examples.
        "salt": secrets.token_hex(_SALT_BYTES),
    }


def read_book(path: Path, db: sqlite3.Connection, marker: Marker | None) -> Book:
    """Read the whole ledger and verify its chain; what the marker says of its length is not held against it here.

    Raises:
        SiteError: 428, it is altered, naming the first charge that was, or not the ledger that the marker names.
    """
    schema = db.execute("SELECT sql FROM sqlite_schema ORDER BY rowid").fetchall()
    if schema != [(sql,) for sql in SCHEMA]:
        refuse(path, "must hold a ledger's two tables only, got others")
    meta = db.execute("SELECT ledger, charges, head FROM meta").fetchall()
    if [[type(value) for value in row] for row in meta] != [[str, int, str]]:
        refuse(path, "must hold one row about itself, got none, several, or a damaged one")
    name, count, head = meta[0]
    if marker is not None and marker.name != name:
        refuse(path, "must be the ledger that was made here, got another one")
    rows = db.execute("SELECT id, record, hash FROM charge ORDER BY id").fetchall()
    last = start = start_of(name)
    for expected, (number, text, kept) in enumerate(rows, start=1):
        # In this order, so that the message is right about the first charge that is not.
        if number > expected:
            _refuse_charge(path, expected, "removed")
        if number < expected or expected > count:
            _refuse_charge(path, number, "inserted")
        last = link(last, text.encode("utf-8", "replace") if isinstance(text, str) else b"")
        if last != kept:
            _refuse_charge(path, expected, "altered or inserted")
    if len(rows) != count:
        _refuse_charge(path, len(rows) + 1, "removed")
    if last != head:
        refuse(
            path,
            f"charge {count}: must be the newest as it was written, was replaced, "
            "or the ones after it were removed",
        )
    records = json.loads(f"[{','.join(text for _, text, _ in rows)}]")
    return Book(name, records, [kept for _, _, kept in rows], start)


def append_charge(
    db: sqlite3.Connection, book: Book, charge: Charge, spent: Spent, delta: float
) -> None:
    """Write a charge to the ledger, which still is to be committed, and to the book."""
    number = len(book.records) + 1
    record = _record(number, charge, spent, delta)
    text = canonical_json(record)
    head = link(book.head, text)
    db.execute("INSERT INTO charge VALUES (?, ?, ?)", (number, text.decode(), head))
    db.execute("UPDATE meta SET charges = ?, head = ?", (number, head))
    book.records.append(record)
    book.hashes.append(head)


def _finite(epsilon: float) -> float | str:
    return epsilon if math.isfinite(epsilon) else repr(epsilon)


def entries_of(book: Book) -> list[Entry]:
    """All charges, the oldest first."""
    return [_entry(*pair) for pair in zip(book.records, book.hashes, strict=True)]


def _entry(record: Record, chain_hash: str) -> Entry:
    r = record
    release = Release(r["noise_multiplier"], r["sampling_rate"], r["steps"], r["fixed_size"])
    charge = Charge(release=release, **{name: r[name] for name in OF_CHARGE})
    epsilons = float(r["epsilon_consumers"]), float(r["epsilon_server"])
    return Entry(r["id"], r["time"], charge, *epsilons, r["epsilon_delta"], chain_hash)


def _refuse_charge(path: Path, number: int, happened: str) -> NoReturn:
    refuse(path, f"charge {number}: must be as it was written, was {happened}")
