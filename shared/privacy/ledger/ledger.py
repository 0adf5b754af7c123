"""A site's lifetime privacy ledger: what every budget account (study) has spent, and a hard stop before too much.

One SQLite file in the site's home. A release of noised data is charged, on the disk, before it leaves; so a crash
leaves a charge too many and never one too few. Each row holds SHA-256(the hash of the row before || canonical JSON of
the row), and a row of its own holds their count and the last hash; every method verifies all of it before it answers.
Each row has 128 random bits, so that a digest that leaves the site tells nothing of what it fixes (rows of an earlier
fedge have none).

The marker beside it holds how many charges there are and the last hash, so that an older copy of the ledger is noticed.

What this notices: damage, an older copy, and the edits of somebody who does not know the chain. What it does not:
anyone who may write in the home can compute a whole new chain and marker, put older copies of both back, or delete
both. Only a digest that has left the site, as in a bundle's signed statement, shows that. It is the site's own
ledger, which keeps the site from overspending by accident or at a server's wish; it is no evidence against the site.
"""

from __future__ import annotations

import math
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from fedge.shared import failpoints
from fedge.shared.config.privacy import CENTRAL, Unit
from fedge.shared.errors import DeployError, SiteError
from fedge.shared.files import flush_folder
from fedge.shared.privacy.accounting.adversaries import Part, of_study, part_of
from fedge.shared.privacy.accounting.charges import Budget, Charge, Entry, Spent
from fedge.shared.privacy.ledger.files import (
    Marker,
    brief,
    check_header,
    check_not_older,
    fill,
    marker_of,
    read_marker,
    refuse,
    write_marker,
)
from fedge.shared.privacy.ledger.records import Book, Record, append_charge, entries_of, read_book

FILE: Final = "privacy.sqlite"
#: Where a test may kill: the row is written but not committed, and committed but not in the marker.
FAIL_POINTS: Final = ("before-charge", "after-charge")

_EXCEEDED, _NO_HOME = 427, 901
_BUSY_SECONDS: Final = 30.0
# A file that is closed gives up the whole process' locks on it, SQLite's too; so one operation at a time.
_ONE_AT_A_TIME = threading.Lock()


class Ledger:
    """A site's ledger. Each method opens the file again, so any number of threads and processes may share it.

    Args:
        path: of a ledger that ``create`` made.

    Raises:
        DeployError: 901, there is none and never was one.
        SiteError: 428, it is gone, damaged, altered, of a newer version, not this site's, or locked for half a
            minute. Every method raises this.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        _require(path)
        self.verify()

    @classmethod
    def create(cls, path: Path) -> Ledger:
        """Make the first and only ledger of a home, mode 0600, whole or not at all.

        Raises:
            SiteError: 428, there is or was one, or it cannot be written.
        """
        if os.path.lexists(path) or os.path.lexists(marker_of(path)):
            refuse(path, "must be created once only, got a ledger or the marker of one")
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(descriptor)
            try:
                fill(temporary)
                # Unlike a rename, a link never takes the place of a file that came in between.
                os.link(temporary, path)
            finally:
                Path(temporary).unlink()
            flush_folder(path.parent)
        except (sqlite3.Error, OSError) as error:
            refuse(path, f"must be possible to create, got {brief(error)}")
        ledger = cls(path)
        with ledger._open(write=True):
            pass  # which leaves the marker
        return ledger

    @classmethod
    def restore(
        cls, path: Path, since: Callable[[list[Entry]], Sequence[tuple[Charge, float]]]
    ) -> list[Entry]:
        """Take an older copy for the ledger from now on, with charges for what it lacks; no budget stops them.

        Killed between, the copy stays refused and is restored again.

        Args:
            path: where the copy lies.
            since: from the copy's charges, those for what was sent since, each with the delta to account at.

        Returns:
            The charges that were added.

        Raises:
            ValueError: there are none to add.
            DeployError, SiteError: see the class.
        """
        _require(path)
        # Not by the constructor, which refuses what this is for.
        ledger = cls.__new__(cls)
        ledger._path = path
        with ledger._open(write=True, older=True) as (db, book):
            charges = since(entries_of(book))
            if not charges:
                raise ValueError("charges: must be at least 1 for what was sent since, got none")
            before = len(book.records)
            for charge, delta in charges:
                spent = _spent(book, charge.study, charge.unit, delta, charge)
                append_charge(db, book, charge, spent, delta)
            db.execute("COMMIT")
            ledger._mark(db)
        return entries_of(book)[before:]

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
                hint = _hint(charge) if math.isinf(counted) else ""
                raise SiteError(
                    _EXCEEDED,
                    f"{charge.study}, unit {charge.unit}: epsilon against the {budget.against} must be at most "
                    f"{budget.epsilon:g} at delta {budget.delta:g}, got {counted:.4f} with {charge.purpose} "
                    f"round {charge.server_round} of {charge.run_id}{hint}",
                )
            append_charge(db, book, charge, spent, budget.delta)
            failpoints.reach(FAIL_POINTS[0], charge.server_round)
            db.execute("COMMIT")
            failpoints.reach(FAIL_POINTS[1], charge.server_round)
            # Before the release leaves: what was sent is in the marker too.
            self._mark(db)
        return spent

    def spent(self, study: str, unit: Unit, delta: float) -> Spent:
        """What a study has spent on a unit, computed at ``delta``."""
        return _spent(self._book(), study, unit, delta)

    def would_spend(self, charge: Charge, delta: float) -> Spent:
        """What its study and unit would have spent with this charge, computed at ``delta``; nothing is written."""
        return _spent(self._book(), charge.study, charge.unit, delta, charge)

    def entries(self, study: str | None = None) -> list[Entry]:
        """All charges, or a study's, the oldest first."""
        return [entry for entry in entries_of(self._book()) if study in (None, entry.charge.study)]

    def studies(self) -> list[str]:
        """Studies that were ever charged, in the order of their first charge."""
        return list(dict.fromkeys(record["study"] for record in self._book().records))

    def digest(self, study: str) -> str:
        """The chain's hash at a study's newest charge; it fixes all charges before, of every study.

        The chain's beginning where the study was never charged.
        """
        book = self._book()
        pairs = zip(reversed(book.records), reversed(book.hashes), strict=True)
        return next(
            (chain_hash for record, chain_hash in pairs if record["study"] == study), book.start
        )

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
                refuse(self._path, f"must be sound, got {answer}")
        return book.head

    def _book(self) -> Book:
        with self._open() as (_, book):
            return book

    @contextmanager
    def _open(
        self, *, write: bool = False, older: bool = False
    ) -> Iterator[tuple[sqlite3.Connection, Book]]:
        """A transaction, and what the ledger holds in it; what is not committed at its end is undone.

        With ``older`` a ledger that lacks what its marker holds will do, and the marker is left as it is.
        """
        with _ONE_AT_A_TIME:
            try:
                check_header(self._path)
                uri = f"{self._path.absolute().as_uri()}?mode=rw"
                with closing(
                    sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_SECONDS)
                ) as db:
                    db.execute("PRAGMA synchronous = FULL")
                    db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                    # Before the ledger is read, as others may charge between: it is never behind its marker.
                    marker = read_marker(self._path)
                    book = read_book(self._path, db, marker)
                    if not older:
                        check_not_older(self._path, marker, book.start, book.hashes)
                        if write:
                            write_marker(self._path, Marker(book.name, len(book.hashes), book.head))
                    yield db, book
            except FileNotFoundError:
                refuse(self._path, "must be there, as a ledger was made here, got none")
            except (sqlite3.Error, OSError) as error:
                refuse(self._path, f"must be a sound ledger and free, got {brief(error)}")

    def _mark(self, db: sqlite3.Connection) -> None:
        # Under the lock again, and with what the ledger then holds, as another may have charged since.
        db.execute("BEGIN IMMEDIATE")
        meta = db.execute("SELECT ledger, charges, head FROM meta").fetchone()
        write_marker(self._path, Marker(*meta))
        db.execute("ROLLBACK")


def _spent(book: Book, study: str, unit: Unit, delta: float, more: Charge | None = None) -> Spent:
    """What the charges of a study come to for a unit."""
    own = [r for r in book.records if r["study"] == study]
    kept = [(r["unit"], r["mechanism"], _part_of(r)) for r in own]
    if more is not None:
        kept.append((more.unit, more.mechanism, part_of(more.release)))
    return Spent(*of_study(kept, unit, delta), len(kept), delta)


def _hint(charge: Charge) -> str:
    """Why there is no bound at all."""
    if charge.mechanism in CENTRAL:
        return "; it gets the updates without noise"
    if charge.unit == "site":
        return "; this study has charges that hide single examples only, which bound nothing for the site"
    return ""


def _part_of(record: Record) -> Part:
    r = record
    return r["noise_multiplier"], r["sampling_rate"], r["fixed_size"], r["steps"]


def _require(path: Path) -> None:
    if not os.path.lexists(path) and not os.path.lexists(marker_of(path)):
        raise DeployError(_NO_HOME, f"{path.parent}: must hold {path.name}, got none")
