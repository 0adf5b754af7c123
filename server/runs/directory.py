"""A run's directory: its files, its lock, and whether a command may use it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedge.server.runs.journal import Journal
from fedge.shared.config import reader
from fedge.shared.config.federation import Config
from fedge.shared.errors import ConfigError, RunError
from fedge.shared.files import take_lock, write_atomically

# Locks that this process holds: flock would refuse a second descriptor of the same process too.
_held: set[Path] = set()


class RunDirectory:
    """Paths and small files of one run.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.journal = path / "journal.db"
        self.rounds = path / "rounds.jsonl"
        self.model = path / "model.safetensors"
        self.metrics = path / "metrics.json"
        self.run = path / "run.json"
        self.report = path / "report.html"
        self.stopped = path / "stopped.json"
        self.checkpoints = path / "checkpoints"
        self.sites = path / "sites"
        self.seen = path / "seen.json"
        self.calibration = path / "calibration.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process; within one process it may be taken again.

        Raises:
            ConfigError: 208, another process holds it.
        """
        key = self.path.resolve()
        if key in _held:
            yield
            return
        try:
            lock = take_lock(self.path / "lock", mode=0o644)
        except BlockingIOError:
            raise ConfigError(
                208, f"{self.path}: must be free, got a lock of another process"
            ) from None
        with lock:
            _held.add(key)
            try:
                yield
            finally:
                _held.discard(key)

    def says_finished(self) -> bool:
        """Whether run.json states that the run is finished; only the journal is authoritative."""
        try:
            state = json.loads(self.run.read_text(encoding="utf-8"))["state"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False
        return bool(state == "finished")

    def write_json(self, path: Path, value: Any) -> None:
        """Replace a JSON file; NaN is refused, as it is no JSON."""
        write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def write_lines(self, lines: list[dict[str, Any]]) -> None:
        """Replace rounds.jsonl by these lines."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        write_atomically(self.rounds, text.encode())

    def append_line(self, line: dict[str, Any]) -> None:
        """Add a line to rounds.jsonl."""
        with self.rounds.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def load_config(self) -> Config:
        """The resolved configuration.

        Raises:
            ConfigError: 209, there is none.
        """
        if not self.config.is_file():
            raise ConfigError(209, f"{self.path}: must hold config.toml, got none")
        return reader.load_resolved(self.config)


State: TypeAlias = Literal["none", "unfinished", "stopped", "finished"]


def state_of(path: Path) -> State:
    """The state of the run in a directory, without opening it for writing; damaged files never raise.

    Returns:
        ``none``: there is no run. ``finished``: its results are complete. ``stopped``: an error of fedge ended it,
        and its cause must be fixed first. ``unfinished``: it is running, or was killed, and can simply be continued.
    """
    directory = RunDirectory(path)
    try:
        if not directory.config.is_file():
            return "none"
        if directory.says_finished() and _journal_says_finished(directory.journal):
            return "finished"
        return "stopped" if directory.stopped.is_file() else "unfinished"
    except OSError:
        return "none"


def _journal_says_finished(journal: Path) -> bool:
    """Whether the journal has the run finished; a kill may have come between run.json and its last transaction.

    An unreadable journal counts as unfinished: opening it for the run reports the error.
    """
    try:
        with closing(
            sqlite3.connect(f"{journal.absolute().as_uri()}?mode=ro", uri=True)
        ) as database:
            row = database.execute("SELECT finished FROM run").fetchone()
    except sqlite3.Error:
        return False
    return row is not None and row[0] is not None


def require_free(path: Path, *, resume: bool) -> list[str]:
    """Refuse a directory in which no run may begin; nothing is created.

    Args:
        path: the run directory.
        resume: whether it may hold a run already.

    Returns:
        Names of its entries, the lock file aside; none unless ``resume``.

    Raises:
        ConfigError: 206, not empty and not resumed; 209, a file; 210, cannot be read.
    """
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(209, f"{path}: must be a directory, got a file")
        entries = (
            sorted(p.name for p in path.iterdir() if p.name != "lock") if path.exists() else []
        )
    except OSError as error:
        raise _cannot_be_made(path, error) from None
    if entries and not resume:
        raise ConfigError(
            206, f"{path}: must be empty, got {len(entries)} entries such as {entries[0]}"
        )
    return entries


def _cannot_be_made(path: Path, error: OSError) -> ConfigError:
    return ConfigError(210, f"{path}: must be a directory that can be made, got {error.strerror}")


def prepare(path: Path, config: Config, *, resume: bool) -> tuple[RunDirectory, bool]:
    """Make a directory ready for a run.

    Args:
        path: the directory; made, with its parents, where missing.
        config: what is to run.
        resume: continue what the directory holds, also where it was stopped, or start where it holds nothing.

    Returns:
        The directory, and whether its run is finished already.

    Raises:
        ConfigError: 206, not empty and not resumed; 207, begun with another configuration; 208, in use;
            209, neither empty nor a run directory; 210, cannot be made or written.
        RunError: 504, the journal is damaged.
    """
    directory = RunDirectory(path)
    foreign = require_free(path, resume=resume)
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        raise _cannot_be_made(path, error) from None
    if not writable:
        raise ConfigError(210, f"{path}: must be writable, got a directory that is not")
    with directory.lock():
        if not directory.config.is_file():
            # A kill may have come before the first file was complete: nothing was lost, and the run starts.
            strays = [name for name in foreign if name != ".config.toml.tmp"]
            if strays:
                raise ConfigError(209, f"{path}: must be a run directory or empty, got {strays[0]}")
            write_atomically(directory.config, reader.dump(config).encode())
        finished, rounds = _progress(directory)
        begun = directory.load_config()
        if begun != config and rounds:
            raise ConfigError(
                207,
                f"{path}: must be the same configuration, got another {_difference(begun, config)}",
            )
        if begun != config:
            # No round was committed, so nothing is lost: a mistake before the first round may simply be corrected.
            _clear(directory)
            write_atomically(directory.config, reader.dump(config).encode())
        directory.stopped.unlink(missing_ok=True)
        return directory, finished


def _progress(directory: RunDirectory) -> tuple[bool, int]:
    """Whether the run is finished, and its committed rounds.

    Raises:
        RunError: 504, the journal is damaged, or missing although run.json names a run.
    """
    row, last = None, None
    if directory.journal.is_file():
        journal = Journal(directory.journal)
        try:
            row, last = journal.run(), journal.last()
        finally:
            journal.close()
    if row is None and directory.run.is_file():
        raise RunError(504, "journal.db: must hold the run that run.json names, got none")
    return row is not None and row.finished is not None, 0 if last is None else last.number


def _clear(directory: RunDirectory) -> None:
    """Remove what a run without a committed round has left; run.json first, as it requires the journal to be there."""
    for name in (
        "run.json",
        "report.html",
        "rounds.jsonl",
        "events.jsonl",
        "stopped.json",
        "journal.db",
        "journal.db-wal",
        "journal.db-shm",
    ):
        (directory.path / name).unlink(missing_ok=True)
    for folder in (directory.checkpoints, directory.sites):
        shutil.rmtree(folder, ignore_errors=True)


def _difference(begun: Config, now: Config) -> str:
    old, new = (
        begun.model_dump(mode="json", by_alias=True),
        now.model_dump(mode="json", by_alias=True),
    )
    for section in new:
        if not isinstance(new[section], dict):
            continue
        for key in new[section] | old[section]:
            a, b = old[section].get(key), new[section].get(key)
            if a != b:
                return f"{section}.{key} ({a} then, {b} now)"
    return "value"
