"""A site's lifetime privacy ledger: what every study has spent, over all its runs, and a hard stop before too much.

One SQLite file in the site's home. A release of noised data is charged, on the disk, before it leaves; so a crash
leaves a charge too many and never one too few. Each row holds SHA-256(the hash of the row before || canonical JSON of
the row), and a row of its own holds their count and the last hash; every method verifies all of it before it answers.

What this notices: damage, and the edits of somebody who does not know the chain. What it does not: whoever may write
in the home can compute a whole new chain, put back an older copy of the file, or delete ledger and marker and create
both anew. Only a digest that has left the site, as in a bundle's signed statement, shows that. It is the site's own
ledger, which keeps the site from overspending by accident or at a server's wish; it is no evidence against the site.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

from fedge.shared import failpoints
from fedge.shared.bounded import open_regular, read_bounded, read_exactly, reason
from fedge.shared.durable import flush_folder, write_atomically
from fedge.shared.errors import DeployError, SiteError
from fedge.shared.privacy.accounting import Release
from fedge.shared.privacy.charges import CENTRAL, OF_CHARGE, Budget, Charge, Entry, Spent, Unit
from fedge.shared.privacy.reckoning import part_of, reckon_parts
from fedge.shared.signing import canonical_json

FILE: Final = "privacy.sqlite"
#: Beside the ledger, the name of the one that is there: it says that one was made, also where it is gone.
MARKER_SUFFIX: Final = ".made"
#: Where a test may kill: the row is written but not committed, and committed but not returned.
FAIL_POINTS: Final = ("before-charge", "after-charge")


_EXCEEDED, _UNRELIABLE, _NO_HOME = 427, 428, 901
_APPLICATION_ID: Final = 0x66706C31  # "fpl1"
_VERSION: Final = 1
_HEADER: Final = 100
_BUSY_SECONDS: Final = 30.0
_MARKER_LIMIT: Final = 64
# A file that is closed gives up the whole process' locks on it, SQLite's too; so one operation at a time.
_ONE_AT_A_TIME = threading.Lock()

# The record is kept as the text that was hashed, so that verifying ten thousand takes a moment.
_SCHEMA: Final = (
    "CREATE TABLE charge (id INTEGER PRIMARY KEY, record TEXT NOT NULL, hash TEXT NOT NULL) STRICT",
    "CREATE TABLE meta (one INTEGER PRIMARY KEY CHECK (one = 1), ledger TEXT NOT NULL, charges INTEGER NOT NULL, "
    "head TEXT NOT NULL) STRICT",
)

_Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class _Book:
    """All charges in one snapshot, verified; hashes are of the chain, ``start`` the one before the first."""

    records: list[_Record]
    hashes: list[str]
    start: str

    @property
    def head(self) -> str:
        return self.hashes[-1] if self.hashes else self.start


class Ledger:
    """A site's ledger. Each method opens the file anew, so any number of threads and processes may share it.

    Args:
        path: of a ledger that ``create`` made.

    Raises:
        DeployError: 901, there is none and never was one.
        SiteError: 428, it is gone, damaged, altered, of a newer version, not this site's, or locked for half a
            minute. Every method raises this.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not os.path.lexists(path) and not os.path.lexists(_marker(path)):
            raise DeployError(_NO_HOME, f"{path.parent}: must hold {path.name}, got none")
        self.verify()

    @classmethod
    def create(cls, path: Path) -> Ledger:
        """Make the first and only ledger of a home, mode 0600, whole or not at all.

        Raises:
            SiteError: 428, there is or was one, or it cannot be written.
        """
        if os.path.lexists(path) or os.path.lexists(_marker(path)):
            _refuse(path, "must be created once only, got a ledger or the marker of one")
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(descriptor)
            try:
                _fill(temporary)
                # Unlike a rename, a link never takes the place of a file that came in between.
                os.link(temporary, path)
            finally:
                Path(temporary).unlink()
            flush_folder(path.parent)
        except (sqlite3.Error, OSError) as error:
            _refuse(path, f"must be possible to create, got {_brief(error)}")
        ledger = cls(path)
        with ledger._open(write=True):
            pass  # which leaves the marker
        return ledger

    def charge(self, charge: Charge, budget: Budget) -> Spent:
        """Write a charge down, durably, unless the budget would be exceeded with it; then nothing is written.

        Every call is a charge: sending the very same reply again is none, and the caller must not call again for it.

        Args:
            charge: what is about to leave the site.
            budget: of its study and unit.

        Returns:
            What its study and unit have then spent, at the budget's delta.

        Raises:
            SiteError: 427, the budget would be exceeded; 428, see the class.
        """
        # Composing may take seconds in a new process; what accounting keeps of it then shortens the time under lock.
        self.would_spend(charge, budget.delta)
        with self._open(write=True) as (db, book):
            spent = _spent(book, charge.study, charge.unit, budget.delta, charge)
            counted = spent.consumers if budget.against == "consumers" else spent.server
            if not counted <= budget.epsilon:
                seen = math.isinf(counted) and charge.mechanism in CENTRAL
                hint = "; it gets the updates without noise" if seen else ""
                raise SiteError(
                    _EXCEEDED,
                    f"{charge.study}, unit {charge.unit}: epsilon against the {budget.against} must be at most "
                    f"{budget.epsilon:g} at delta {budget.delta:g}, got {counted:.4f} with {charge.purpose} "
                    f"round {charge.server_round} of {charge.run_id}{hint}",
                )
            number = len(book.records) + 1
            text = canonical_json(_record(number, charge, spent, budget.delta))
            head = _link(book.head, text)
            db.execute("INSERT INTO charge VALUES (?, ?, ?)", (number, text.decode(), head))
            db.execute("UPDATE meta SET charges = ?, head = ?", (number, head))
            failpoints.reach(FAIL_POINTS[0], charge.server_round)
            db.execute("COMMIT")
            failpoints.reach(FAIL_POINTS[1], charge.server_round)
        return spent

    def spent(self, study: str, unit: Unit, delta: float) -> Spent:
        """What a study has spent on a unit, reckoned at ``delta``."""
        return _spent(self._book(), study, unit, delta)

    def would_spend(self, charge: Charge, delta: float) -> Spent:
        """What its study and unit would have spent with this charge, reckoned at ``delta``; nothing is written."""
        return _spent(self._book(), charge.study, charge.unit, delta, charge)

    def entries(self, study: str | None = None) -> list[Entry]:
        """All charges, or a study's, the oldest first."""
        book = self._book()
        pairs = zip(book.records, book.hashes, strict=True)
        return [_entry(record, link) for record, link in pairs if study in (None, record["study"])]

    def studies(self) -> list[str]:
        """Studies that were ever charged, in the order of their first charge."""
        return list(dict.fromkeys(record["study"] for record in self._book().records))

    def digest(self, study: str) -> str:
        """The chain's hash at a study's newest charge; it fixes all charges before, of every study.

        The chain's beginning where the study was never charged.
        """
        book = self._book()
        pairs = zip(reversed(book.records), reversed(book.hashes), strict=True)
        return next((link for record, link in pairs if record["study"] == study), book.start)

    def verify(self) -> str:
        """Read the whole file and recompute the chain.

        Returns:
            The chain's head.

        Raises:
            SiteError: 428, naming the first charge that was altered, removed or inserted.
        """
        with self._open() as (db, book):
            (answer,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if answer != "ok":
                _refuse(self._path, f"must be sound, got {answer}")
        return book.head

    def _book(self) -> _Book:
        with self._open() as (_, book):
            return book

    @contextmanager
    def _open(self, *, write: bool = False) -> Iterator[tuple[sqlite3.Connection, _Book]]:
        """A transaction, and what the ledger holds in it; what is not committed at its end is undone."""
        with _ONE_AT_A_TIME:
            try:
                self._check_header()
                uri = f"{self._path.absolute().as_uri()}?mode=rw"
                with closing(
                    sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_SECONDS)
                ) as db:
                    db.execute("PRAGMA synchronous = FULL")
                    db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                    yield db, self._verified(db, write=write)
            except FileNotFoundError:
                _refuse(self._path, "must be there, as a ledger was made here, got none")
            except (sqlite3.Error, OSError) as error:
                _refuse(self._path, f"must be a sound ledger and free, got {_brief(error)}")

    def _check_header(self) -> None:
        # By hand, as SQLite may write to a file, of whatever program, when it opens it.
        if self._path.is_symlink():
            _refuse(self._path, "must be a file, got a symbolic link")
        file, _ = open_regular(self._path)
        with file:
            header = read_exactly(file, _HEADER)
        version, application = (int.from_bytes(header[at : at + 4]) for at in (60, 68))
        if not header.startswith(b"SQLite format 3\0") or application != _APPLICATION_ID:
            _refuse(self._path, "must be a privacy ledger, got another or a damaged file")
        if version != _VERSION:
            newer = " of a newer fedge" if version > _VERSION else ""
            _refuse(self._path, f"must be of version {_VERSION}, got {version}{newer}")

    def _check_marker(self, name: str, *, write: bool) -> None:
        try:
            found = read_bounded(_marker(self._path), _MARKER_LIMIT)
        except FileNotFoundError:
            # Killed while it was created, or restored without. None but the one who writes may mend it.
            if write:
                write_atomically(_marker(self._path), f"{name}\n".encode())
            return
        if found != f"{name}\n".encode():
            _refuse(self._path, "must be the ledger that was made here, got another one")

    def _verified(self, db: sqlite3.Connection, *, write: bool) -> _Book:
        schema = db.execute("SELECT sql FROM sqlite_schema ORDER BY rowid").fetchall()
        if schema != [(sql,) for sql in _SCHEMA]:
            _refuse(self._path, "must hold a ledger's two tables only, got others")
        meta = db.execute("SELECT ledger, charges, head FROM meta").fetchall()
        if [[type(value) for value in row] for row in meta] != [[str, int, str]]:
            _refuse(
                self._path, "must hold one row about itself, got none, several, or a damaged one"
            )
        name, count, head = meta[0]
        self._check_marker(name, write=write)
        rows = db.execute("SELECT id, record, hash FROM charge ORDER BY id").fetchall()
        last = start = _start(name)
        for expected, (number, text, link) in enumerate(rows, start=1):
            # In this order, so that the message is right about the first charge that is not.
            if number > expected:
                self._refuse_charge(expected, "removed")
            if number < expected or expected > count:
                self._refuse_charge(number, "inserted")
            last = _link(last, text.encode("utf-8", "replace") if isinstance(text, str) else b"")
            if last != link:
                self._refuse_charge(expected, "altered or inserted")
        if len(rows) != count:
            self._refuse_charge(len(rows) + 1, "removed")
        if last != head:
            _refuse(
                self._path,
                f"charge {count}: must be the newest as it was written, was replaced, "
                "or the ones after it were removed",
            )
        records = json.loads(f"[{','.join(text for _, text, _ in rows)}]")
        return _Book(records, [link for _, _, link in rows], start)

    def _refuse_charge(self, number: int, happened: str) -> NoReturn:
        _refuse(self._path, f"charge {number}: must be as it was written, was {happened}")


def _spent(book: _Book, study: str, unit: Unit, delta: float, more: Charge | None = None) -> Spent:
    own = [r for r in book.records if r["study"] == study and r["unit"] == unit]
    parts = [(r["noise_multiplier"], r["sampling_rate"], r["fixed_size"], r["steps"]) for r in own]
    mechanisms = {r["mechanism"] for r in own}
    if more is not None:
        parts.append(part_of(more.release))
        mechanisms.add(more.mechanism)
    consumers, server = reckon_parts(parts, delta, unit)
    return Spent(consumers, server if mechanisms.isdisjoint(CENTRAL) else math.inf, len(parts))


def _record(number: int, charge: Charge, spent: Spent, delta: float) -> _Record:
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
    }


def _finite(epsilon: float) -> float | str:
    return epsilon if math.isfinite(epsilon) else repr(epsilon)


def _entry(record: _Record, link: str) -> Entry:
    of = record
    release = Release(of["noise_multiplier"], of["sampling_rate"], of["steps"], of["fixed_size"])
    charge = Charge(release=release, **{name: of[name] for name in OF_CHARGE})
    epsilons = float(of["epsilon_consumers"]), float(of["epsilon_server"])
    return Entry(of["id"], of["time"], charge, *epsilons, of["epsilon_delta"], link)


def _link(previous: str, record: bytes) -> str:
    """The chain's next hash: SHA-256(previous || record)."""
    return hashlib.sha256(bytes.fromhex(previous) + record).hexdigest()


def _start(name: str) -> str:
    return hashlib.sha256(canonical_json({"ledger": name})).hexdigest()


def _fill(path: str) -> None:
    """Make an empty ledger of a file that is empty; closed, all of it is in the one file."""
    name = secrets.token_hex(16)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {_VERSION}")
        for sql in _SCHEMA:
            db.execute(sql)
        db.execute("INSERT INTO meta VALUES (1, ?, 0, ?)", (name, _start(name)))


def _marker(path: Path) -> Path:
    return path.with_name(path.name + MARKER_SUFFIX)


def _brief(error: Exception) -> str:
    return reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"[:160]


def _refuse(path: Path, problem: str) -> NoReturn:
    raise SiteError(_UNRELIABLE, f"{path}: {problem}") from None
