"""Replies on their way from the SuperLink, each node's in a call of its own.

Flower hands a reply out as soon as its upload has begun, and then waits inside the call for what is missing: three
minutes where the line broke in between. In a call for all nodes one broken upload would hold up everybody's reply.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedge.server.transport.grid_calls import GridClient, of_the_line
from fedge.shared.errors import brief

_log = logging.getLogger(__name__)

#: Seconds after which a call is left to itself while the next one begins. Most take a hundredth.
_GLANCE = 0.1


class _Fetch:
    """One call, in a thread."""

    def __init__(self, grid: Grid, ids: Sequence[str]) -> None:
        self.ids = frozenset(ids)
        self.replies: list[Message] = []
        self.error: BaseException | None = None
        self.over = threading.Event()
        threading.Thread(target=self._work, args=(grid,), name="grid-fetch", daemon=True).start()

    def _work(self, grid: Grid) -> None:
        try:
            self.replies = list(grid.pull_messages(sorted(self.ids)))
        except BaseException as error:  # raised again where it is waited for
            self.error = error
        finally:
            self.over.set()


class PendingPulls:
    """The calls of one exchange.

    Args:
        link: to the grid.
    """

    def __init__(self, link: GridClient) -> None:
        self._link = link
        self._open: list[_Fetch] = []

    @property
    def held(self) -> frozenset[str]:
        """Message ids whose call has not returned, or not been collected: Flower gives each reply once."""
        return frozenset().union(*(f.ids for f in self._open))

    def take(self, groups: Iterable[Sequence[str]]) -> tuple[list[Message], list[str], bool]:
        """Ask for replies, and collect those of this and of earlier calls.

        Args:
            groups: message ids, those of one node together.

        Returns:
            Replies, the ids of those that Flower could not read, and whether the line to the SuperLink failed.

        Raises:
            Exception: the SuperLink refused a call for good.
        """
        for ids in groups:
            held = self.held
            if free := [number for number in ids if number not in held]:
                fetch = _Fetch(self._link.grid, free)
                self._open.append(fetch)
                fetch.over.wait(_GLANCE)
        over = [f for f in self._open if f.over.is_set()]
        self._open = [f for f in self._open if f not in over]
        unreadable: list[str] = []
        failed = False
        for fetch in over:
            if isinstance(fetch.error, Exception) and not of_the_line(fetch.error):
                # A site decides what its reply is made of, and Flower takes it apart here, in the server's process.
                _log.warning("a reply cannot be read: %s", brief(fetch.error))
                unreadable += fetch.ids
            elif fetch.error is not None:
                self._link.note_failure("fetch replies", fetch.error)
                failed = True
        return [reply for fetch in over for reply in fetch.replies], unreadable, failed
