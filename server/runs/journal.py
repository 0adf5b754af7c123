"""The write-ahead journal of a run: SQLite in WAL mode, the one truth about what was committed.

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
    """A committed round; round 0 is the initial model and has no line."""

    number: int
    checkpoint: str
    checkpoint_sha256: str


@dataclass(frozen=True)
class RunRow:
    """The run: fedge's id, which outlives Flower's, and its times in UTC."""

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
        """Write down the run, once."""
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
        """Write down that one of Flower's runs now carries this run."""
        self._query("INSERT INTO flower_run VALUES (?, ?)", str(flower_run_id), started)

    def flower_runs(self) -> list[str]:
        """Ids of the Flower runs that carried this run, in order."""
        return [
            row[0] for row in self._query("SELECT flower_run_id FROM flower_run ORDER BY rowid")
        ]

    def run_preprocessing_missing(self) -> bool:
        """Whether ``fix_preprocessing`` was not called yet."""
        return bool(self._query("SELECT 1 FROM run WHERE preprocessing IS NULL"))

    def fix_preprocessing(self, steps: list[dict[str, Any]]) -> None:
        """Write down the fitted preprocessing; it never changes within a run."""
        self._query(
            "UPDATE run SET preprocessing = ? WHERE preprocessing IS NULL", json.dumps(steps)
        )

    def add_site(self, name: str, train_examples: int, test_examples: int) -> None:
        """Write down what a site registered with; the first word counts."""
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
        """Every registered site in the order in which they were first written down, which never changes."""
        return [row[0] for row in self._query("SELECT name FROM site ORDER BY rowid")]

    def commit(self, commit: Commit, line: Line) -> None:
        """Commit a round: from here on it counts."""
        self._query(
            "INSERT INTO round VALUES (?, ?, ?, ?)",
            commit.number,
            json.dumps(line, allow_nan=False),
            commit.checkpoint,
            commit.checkpoint_sha256,
        )

    def amend(self, number: int, line: Line) -> None:
        """Complete the line of a committed round by what was measured afterwards."""
        self._query(
            "UPDATE round SET line = ? WHERE number = ?", json.dumps(line, allow_nan=False), number
        )

    def calibrate(self, text: str, number: int, line: Line) -> None:
        """Write down calibration.json, and what it adds to the line of the last round, together."""
        self._rewrite(
            "DELETE FROM calibration", "INSERT INTO calibration VALUES (?)", text, number, line
        )

    def keep_ranges(self, text: str, number: int, line: Line) -> None:
        """Write down what of calibration.json is known after its first exchange, likewise."""
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
        """What was known of calibration.json after its first exchange; None where it was not written down."""
        rows = self._query("SELECT text FROM ranges")
        return None if not rows else str(rows[0][0])

    def calibration(self) -> str | None:
        """calibration.json as it was written down; None where it was not."""
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
        """Write down that the run is complete and its files are written."""
        self._query("UPDATE run SET finished = ?", finished)
