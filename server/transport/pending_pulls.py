"""Pull calls to the SuperLink that have not returned yet, one call a node.

Flower returns a reply as soon as its upload has begun, and then waits inside the call for the rest: three minutes where
the connection broke in between. In one call for all nodes, a broken upload would delay the replies of all of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedge.server.transport.grid_calls import GridClient, is_call_failure
from fedge.shared.errors import brief

_log = logging.getLogger(__name__)

#: Seconds after which a call goes on in the background while the next one begins. Most take a hundredth.
_GLANCE = 0.1


class _Pull:
    """One pull call, in a thread of its own."""

    def __init__(self, grid: Grid, ids: Sequence[str]) -> None:
        self.ids = frozenset(ids)
        self.replies: list[Message] = []
        self.error: BaseException | None = None
        self.finished = threading.Event()
        threading.Thread(target=self._work, args=(grid,), name="grid-fetch", daemon=True).start()

    def _work(self, grid: Grid) -> None:
        try:
            self.replies = list(grid.pull_messages(sorted(self.ids)))
        except BaseException as error:  # raised again where the replies are collected
            self.error = error
        finally:
            self.finished.set()


class PendingPulls:
    """The pull calls of one exchange that have not returned yet.

    Args:
        grid_client: gives the grid, and records failures of the connection.
    """

    def __init__(self, grid_client: GridClient) -> None:
        self._grid_client = grid_client
        self._open: list[_Pull] = []

    @property
    def held(self) -> frozenset[str]:
        """Message ids whose call has not returned, or not been collected: Flower gives each reply once."""
        return frozenset().union(*(f.ids for f in self._open))

    def take(self, groups: Iterable[Sequence[str]]) -> tuple[list[Message], list[str], bool]:
        """Ask for replies, and collect those of this and of earlier calls.

        Args:
            groups: ids of the requests, one group a node.

        Returns:
            Replies, the ids of those that Flower could not read, and whether the connection to the SuperLink failed.

        Raises:
            Exception: the SuperLink refused a call, and a retry would not help.
        """
        for ids in groups:
            held = self.held
            if free := [number for number in ids if number not in held]:
                pull = _Pull(self._grid_client.grid, free)
                self._open.append(pull)
                pull.finished.wait(_GLANCE)
        finished = [f for f in self._open if f.finished.is_set()]
        self._open = [f for f in self._open if f not in finished]
        unreadable: list[str] = []
        failed = False
        for pull in finished:
            if isinstance(pull.error, Exception) and not is_call_failure(pull.error):
                # A reply is untrusted input, and Flower parses it here, in the server's process.
                _log.warning("a reply cannot be read: %s", brief(pull.error))
                unreadable += pull.ids
            elif pull.error is not None:
                self._grid_client.note_failure("fetch replies", pull.error)
                failed = True
        return [reply for pull in finished for reply in pull.replies], unreadable, failed
