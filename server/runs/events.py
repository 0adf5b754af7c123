"""A run's events in a file, so that another process can show the progress: one JSON line each, flushed at once.

Everything in it can be lost without harm; what counts is in the journal.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final

from fedge.server.runs.listener import Listener

_log = logging.getLogger(__name__)

#: The file's name in a run directory.
NAME: Final = "events.jsonl"
#: Bytes beyond which the file is started over.
MAX_BYTES: Final = 5 * 2**20
#: The longest line that is written or read, in bytes; what is longer is left out.
MAX_LINE: Final = 256 * 2**10
_CHUNK: Final = 2**20
#: Leading bytes that identify a file; they include a time with its microseconds.
_BEGINNING: Final = 64
_PAUSE: Final = 0.2

Fields = dict[str, Any]


class EventLog:
    """A listener that appends every event to a file, one JSON object a line.

    A file that cannot be written is logged once; the run goes on.

    Args:
        path: the file; appended to, and started over beyond ``limit`` bytes.
        limit: largest size of the file, in bytes.
    """

    def __init__(self, path: Path, limit: int = MAX_BYTES) -> None:
        self._path, self._limit = path, limit
        self._number = 0
        self._broken = False

    def start(self, total_rounds: int, done: int = 0) -> None:
        """Append the event."""
        self._write("start", total=total_rounds, done=done)

    def site(self, server_round: int, site: str, done: int, total: int) -> None:
        """Append the event."""
        self._write("site", round=server_round, site=site, done=done, total=total)

    def round(self, line: Fields) -> None:
        """Append the event."""
        self._write("round", line=line)

    def sent(self, server_round: int, done: int, total: int, nbytes: int) -> None:
        """Append the event."""
        self._write("sent", round=server_round, done=done, total=total, bytes=nbytes)

    def waiting(self, server_round: int, phase: str, sites: Sequence[str], seconds: float) -> None:
        """Append the event, and log it."""
        _log.info(
            "round %d: %s, waiting for %d sites since %.0f s",
            server_round,
            phase,
            len(sites),
            seconds,
        )
        self._write(
            "waiting",
            round=server_round,
            phase=phase,
            sites=list(sites)[:1000],
            seconds=round(seconds, 3),
        )

    def disconnected(self, server_round: int, site: str, seconds: float) -> None:
        """Append the event, and log it."""
        _log.warning("round %d: %s is not connected any more", server_round, site)
        self._write("lost", round=server_round, site=site, seconds=round(seconds, 3))

    def reconnected(self, server_round: int, site: str, seconds: float) -> None:
        """Append the event, and log it."""
        _log.info("round %d: %s is back after %.0f s", server_round, site, seconds)
        self._write("back", round=server_round, site=site, seconds=round(seconds, 3))

    def _write(self, event: str, **fields: Any) -> None:
        self._number += 1
        at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        data = (json.dumps({"event": event, "n": self._number, "at": at, **fields}) + "\n").encode()
        if len(data) > MAX_LINE:
            return
        try:
            size = self._path.stat().st_size if self._path.is_file() else 0
            with self._path.open("wb" if size + len(data) > self._limit else "ab") as file:
                file.write(data)
        except OSError as error:
            if not self._broken:
                _log.warning("%s cannot be written: %s", self._path, error.strerror)
            self._broken = True


def dispatch(event: object, listener: Listener) -> None:
    """Call the listener's method for one event.

    Args:
        event: one parsed line of the file, untrusted; an unknown or malformed event is ignored.
        listener: to be called.
    """
    if not isinstance(event, dict):
        return
    try:
        match event.get("event"):
            case "start":
                listener.start(int(event["total"]), int(event["done"]))
            case "site":
                listener.site(
                    int(event["round"]), str(event["site"]), int(event["done"]), int(event["total"])
                )
            case "round":
                line = event["line"]
                if isinstance(line, dict) and type(line.get("round")) is int:
                    listener.round(line)
            case "sent":
                listener.sent(
                    int(event["round"]),
                    int(event["done"]),
                    int(event["total"]),
                    int(event["bytes"]),
                )
            case "waiting":
                sites = [str(s) for s in event["sites"]]
                listener.waiting(
                    int(event["round"]), str(event["phase"]), sites, float(event["seconds"])
                )
            case "lost":
                listener.disconnected(
                    int(event["round"]), str(event["site"]), float(event["seconds"])
                )
            case "back":
                listener.reconnected(
                    int(event["round"]), str(event["site"]), float(event["seconds"])
                )
            case _:
                pass
    except (KeyError, TypeError, ValueError, OverflowError):
        _log.debug("an event does not parse")


class _Reader:
    """The complete lines of a file that grows, is started over, or does not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset, self._inode, self._first = 0, 0, b""
        self._rest = b""

    def lines(self) -> Iterator[bytes]:
        try:
            with self._path.open("rb") as file:
                self._restart_if_replaced(file)
                file.seek(self._offset)
                data = file.read(_CHUNK)
                self._offset += len(data)
        except OSError:
            return
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            self._rest = b""
        yield from whole

    def _restart_if_replaced(self, file: IO[bytes]) -> None:
        # Each line holds its time, so another beginning is another file, even where it has outgrown the old one.
        first, status = file.read(_BEGINNING), os.fstat(file.fileno())
        same = status.st_ino == self._inode and status.st_size >= self._offset
        if not same or first[: len(self._first)] != self._first:
            self._offset, self._rest = 0, b""
        self._first, self._inode = first, status.st_ino


def follow(
    path: Path,
    listener: Listener,
    stop: Callable[[], bool],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Pass every event of a file to a listener, from its beginning and as it grows.

    Args:
        path: of the file; it need not exist yet, and may be started over.
        listener: gets the events.
        stop: whether to return once all events that are in the file have been passed on.
        sleep: pauses between two reads, in seconds.
    """
    file = _Reader(path)
    while True:
        last = stop()
        progressed = False
        for line in file.lines():
            progressed = True
            try:
                event = json.loads(line) if len(line) <= MAX_LINE else None
            except (ValueError, RecursionError):
                continue
            dispatch(event, listener)
        if progressed:
            continue
        if last:
            return
        sleep(_PAUSE)
