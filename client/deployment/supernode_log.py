"""What Flower's node says in its log, which is the only place where it says how it fares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

#: What Flower's node writes when it is connected.
CONNECTED = "SuperNode ID:"
#: That it sends a reply; or that it takes another message, which one that waits for a reply never does. From 1.43 on a
#: node whose process ended without a reply goes on so.
MOVES_ON = ("Sending:", "Receiving:")
#: That it will not call again; that the server does not know its key.
DISCONNECTED = ("Giving up reconnection", "SSL/TLS handshake error detected")
UNKNOWN = ("Failed to activate SuperNode", "[code: 2004]")
#: Most of a log that one look reads, and what it reads again of the look before, as words may lie across both.
LOG_PIECE, _OVERLAP = 1 << 20, 256


class SupernodeLog:
    """What a node has written to its log since its start, each part read once.

    Args:
        path: of the log, whose present content is a former node's.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._said = path, set[str]()
        try:
            found = path.stat()
        except OSError:
            self._inode = self._start = 0
        else:
            self._inode, self._start = found.st_ino, found.st_size
        self._offset = self._start

    def said(self, words: Sequence[str]) -> bool:
        """Whether any of these words was written; of more than ``LOG_PIECE`` new bytes the last are read.

        Args:
            words: some of those that the module names above; a look reads the log once for all.
        """
        text = self._new()
        self._said.update(w for w in (CONNECTED, *DISCONNECTED, *UNKNOWN) if w in text)
        return not self._said.isdisjoint(words)

    def _new(self) -> str:
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    # Moved aside, or truncated.
                    self._inode, self._start, self._offset = found.st_ino, 0, 0
                if found.st_size == self._offset:
                    return ""
                file.seek(max(self._start, self._offset - _OVERLAP, found.st_size - LOG_PIECE))
                text = file.read(LOG_PIECE + _OVERLAP)
                self._offset = file.tell()
        except OSError:
            return ""
        return text.decode("utf-8", errors="replace")


def tail(path: Path, start: int) -> str:
    """A log from a byte on; from its beginning where it was moved aside since."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(start if start <= size else 0)
            return file.read(LOG_PIECE).decode("utf-8", errors="replace")
    except OSError:
        return ""
