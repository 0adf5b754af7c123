"""Logs of a daemon's processes: bounded, also where a process runs for a year."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

#: A log beyond this many bytes is moved aside: when its process is restarted, or while it runs.
LIMIT: Final = 10 * 2**20


def aside(log: Path) -> Path:
    """Path of the older part of a log."""
    return log.with_suffix(".log.1")


def bound(folder: Path, limit: int = LIMIT) -> list[Path]:
    """Move the content of every log that is too large aside, replacing what lay there.

    The writers keep their open files: these are open for appending, so that they go on at the new end. A line that is
    written between the copy and the cut is lost.

    Args:
        folder: holds ``*.log``.
        limit: bytes; of more only the last are kept.

    Returns:
        The logs that were cut.
    """
    cut: list[Path] = []
    for log in sorted(folder.glob("*.log")):
        size = log.stat().st_size
        if size <= limit:
            continue
        with log.open("rb") as file:
            file.seek(size - limit)
            tail = file.read(limit)
        target = aside(log)
        target.write_bytes(tail)
        os.truncate(log, 0)
        cut.append(log)
    return cut
