"""The connection state of Flower's node, read from its log, the only place that shows it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

#: What Flower's node writes when it is connected.
CONNECTED = "SuperNode ID:"
#: What it writes when it sends a reply, or takes another message, which a node that waits for a reply never does. From
#: 1.43 on a node whose process ended without a reply continues with another message.
MOVES_ON = ("Sending:", "Receiving:")
#: What it writes when it stops reconnecting; when the server does not know its key.
DISCONNECTED = ("Giving up reconnection", "SSL/TLS handshake error detected")
UNKNOWN = ("Failed to activate SuperNode", "[code: 2004]")
#: Maximum bytes that one check reads, and bytes that are read again, as words may span two checks.
LOG_PIECE, _OVERLAP = 1 << 20, 256


class SupernodeLog:
    """The log of a node since its start, each part read once.

    Args:
        path: of the log; its present content is of an earlier node and ignored.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._logged = path, set[str]()
        try:
            file = path.stat()
        except OSError:
            self._inode = self._start = 0
        else:
            self._inode, self._start = file.st_ino, file.st_size
        self._offset = self._start

    def has_logged(self, words: Sequence[str]) -> bool:
        """Whether any of these words was written; of more than ``LOG_PIECE`` new bytes only the last are read.

        Args:
            words: some of the module's constants; each check searches for all of them.
        """
        text = self._new()
        self._logged.update(w for w in (CONNECTED, *DISCONNECTED, *UNKNOWN) if w in text)
        return not self._logged.isdisjoint(words)

    def _new(self) -> str:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    # Rotated, or truncated.
                    self._inode, self._start, self._offset = status.st_ino, 0, 0
                if status.st_size == self._offset:
                    return ""
                file.seek(max(self._start, self._offset - _OVERLAP, status.st_size - LOG_PIECE))
                text = file.read(LOG_PIECE + _OVERLAP)
                self._offset = file.tell()
        except OSError:
            return ""
        return text.decode("utf-8", errors="replace")


def tail(path: Path, start: int) -> str:
    """The text of a log from byte ``start`` on, or from its beginning if it was rotated since."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(start if start <= size else 0)
            return file.read(LOG_PIECE).decode("utf-8", errors="replace")
    except OSError:
        return ""
