"""The write-ahead journal of a run: SQLite in WAL mode, the only authority on what was committed.

A round is committed by one transaction that names its checkpoint and the checkpoint's SHA-256; files written before
it are worthless until then, files derived from it (rounds.jsonl, metrics.json) can be made again.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedge.shared.errors import RunError

Line: TypeAlias = dict[str, Any]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (
    id TEXT PRIMARY KEY, config TEXT NOT NULL, started TEXT NOT NULL, finished TEXT, preprocessing TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS flower_run (flower_run_id TEXT NOT NULL, started TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS site (
    name TEXT PRIMARY KEY, train_examples INTEGER NOT NULL, test_examples INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS calibration (text TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS ranges (text TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS round (
    number INTEGER PRIMARY KEY, line TEXT NOT NULL, checkpoint TEXT NOT NULL, checkpoint_sha256 TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True)
class Commit:
    """A committed round; round 0 is the initial model and has no line.

    Attributes:
        number: of the round.
        checkpoint: file name in the folder of checkpoints.
        checkpoint_sha256: of that file, hexadecimal.
    """

    number: int
    checkpoint: str
    checkpoint_sha256: str


@dataclass(frozen=True)
class RunRow:
    """The run.

    Attributes:
        id: fedge's, which stays the same when Flower's changes.
        config: text of the resolved configuration, TOML.
        started: time in UTC.
        finished: time in UTC; None while it runs.
        preprocessing: fitted steps as JSON values; None before they are fitted.
    """

    id: str
    config: str
    started: str
    finished: str | None
    preprocessing: list[dict[str, Any]] | None


class Journal:
    """An open journal. Every method is one transaction, on the disk when it returns.

    Raises:
        RunError: 504, the file is not a journal, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise RunError(504, f"{path.name}: must be a journal, got {error}") from None

    def close(self) -> None:
        """Close the file; the WAL is folded in."""
        self._db.close()

    def _query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise RunError(504, f"{self._path.name}: {error}") from None

    def _parsed(self, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise RunError(504, f"{self._path.name}: must hold JSON, got {error}") from None

    def begin_run(self, run_id: str, config: str, started: str) -> None:
        """Record the run, once.

        Args:
            run_id: fedge's id.
            config: text of the resolved configuration, TOML.
            started: time in UTC, as ``results.now`` writes it.
        """
        self._query(
            "INSERT INTO run (id, config, started) VALUES (?, ?, ?)", run_id, config, started
        )

    def run(self) -> RunRow | None:
        """The run, or None where nothing was begun."""
        rows = self._query("SELECT id, config, started, finished, preprocessing FROM run")
        if not rows:
            return None
        run_id, config, started, finished, preprocessing = rows[0]
        return RunRow(
            run_id,
            config,
            started,
            finished,
            None if preprocessing is None else self._parsed(preprocessing),
        )

    def begin_flower_run(self, flower_run_id: int, started: str) -> None:
        """Record that one of Flower's runs now executes this run."""
        self._query("INSERT INTO flower_run VALUES (?, ?)", str(flower_run_id), started)

    def flower_runs(self) -> list[str]:
        """Ids of the Flower runs that executed this run, in order."""
        return [
            row[0] for row in self._query("SELECT flower_run_id FROM flower_run ORDER BY rowid")
        ]

    def run_preprocessing_missing(self) -> bool:
        """Whether no fitted preprocessing has been recorded yet."""
        return bool(self._query("SELECT 1 FROM run WHERE preprocessing IS NULL"))

    def fix_preprocessing(self, steps: list[dict[str, Any]]) -> None:
        """Record the fitted preprocessing; it never changes within a run."""
        self._query(
            "UPDATE run SET preprocessing = ? WHERE preprocessing IS NULL", json.dumps(steps)
        )

    def add_site(self, name: str, train_examples: int, test_examples: int) -> None:
        """Record the numbers of examples that a site registered with; only its first registration counts."""
        self._query(
            "INSERT OR IGNORE INTO site VALUES (?, ?, ?)", name, train_examples, test_examples
        )

    def sites(self) -> dict[str, tuple[int, int]]:
        """(train, test) examples of every registered site, in name order."""
        return {
            name: (train, test)
            for name, train, test in self._query("SELECT * FROM site ORDER BY name")
        }

    def order(self) -> list[str]:
        """Every registered site in the order of first registration, which never changes."""
        return [row[0] for row in self._query("SELECT name FROM site ORDER BY rowid")]

    def commit(self, commit: Commit, line: Line) -> None:
        """Commit a round.

        Args:
            commit: names the round's checkpoint.
            line: the round's line of rounds.jsonl.
        """
        self._query(
            "INSERT INTO round VALUES (?, ?, ?, ?)",
            commit.number,
            json.dumps(line, allow_nan=False),
            commit.checkpoint,
            commit.checkpoint_sha256,
        )

    def amend(self, number: int, line: Line) -> None:
        """Replace the line of a committed round, completed by later measurements."""
        self._query(
            "UPDATE round SET line = ? WHERE number = ?", json.dumps(line, allow_nan=False), number
        )

    def calibrate(self, text: str, number: int, line: Line) -> None:
        """Record calibration.json and the amended line of the last round, in one transaction.

        Args:
            text: of calibration.json.
            number: of the round.
            line: the round's line, complete.
        """
        self._rewrite(
            "DELETE FROM calibration", "INSERT INTO calibration VALUES (?)", text, number, line
        )

    def keep_ranges(self, text: str, number: int, line: Line) -> None:
        """Record the part of calibration.json that its first exchange gives; arguments as ``calibrate``."""
        self._rewrite("DELETE FROM ranges", "INSERT INTO ranges VALUES (?)", text, number, line)

    def _rewrite(self, delete: str, insert: str, text: str, number: int, line: Line) -> None:
        self._query("BEGIN IMMEDIATE")
        try:
            self._query(delete)
            self._query(insert, text)
            self.amend(number, line)
        except BaseException:
            self._query("ROLLBACK")
            raise
        self._query("COMMIT")

    def ranges(self) -> str | None:
        """The part of calibration.json that its first exchange gave; None where none was recorded."""
        rows = self._query("SELECT text FROM ranges")
        return None if not rows else str(rows[0][0])

    def calibration(self) -> str | None:
        """The text of calibration.json; None where none was recorded."""
        rows = self._query("SELECT text FROM calibration")
        return None if not rows else str(rows[0][0])

    def last(self) -> Commit | None:
        """The newest committed round."""
        rows = self._query(
            "SELECT number, checkpoint, checkpoint_sha256 FROM round ORDER BY number DESC LIMIT 1"
        )
        return Commit(*rows[0]) if rows else None

    def lines(self) -> list[Line]:
        """The lines of all rounds from 1 on, in order."""
        return [
            self._parsed(row[0])
            for row in self._query("SELECT line FROM round WHERE number > 0 ORDER BY number")
        ]

    def finish(self, finished: str) -> None:
        """Record that the run is complete and its files are written."""
        self._query("UPDATE run SET finished = ?", finished)
