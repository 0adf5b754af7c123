"""A patch of Flower's private code at a site: its node polls more often while there is work.

Flower's node sleeps three seconds after each empty poll, and half a second between checks for a reply; both
are fixed in ``start_client_internal``. Between the exchanges of a run that is most of the time a round takes, so
there the pauses are shorter. Where a release of Flower lacks the patched code, only speed is lost.

A test names the Flower versions for which it was read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

#: Flower's releases whose ``start_client_internal`` was read for this.
READ: Final = ("1.41", "1.42")
#: Seconds between polls for ``BUSY_FOR`` seconds after a message, and between checks for its reply.
POLL, LOOK, BUSY_FOR = 0.5, 0.05, 60.0

#: Flower's own pauses in seconds: after an empty poll, and while a reply is awaited.
_IDLE, _AWAITING = 3, 0.5


class NodeClock:
    """The module ``time`` as Flower's node sees it: its pauses are short while a run is under way.

    Args:
        sleep: of the real module.
        now: monotonic seconds.
    """

    def __init__(
        self,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sleep, self._now = sleep, now
        self._busy_until = 0.0

    def sleep(self, seconds: float) -> None:
        """Sleep; Flower's own polling pauses are shortened.

        Args:
            seconds: as Flower asks for.
        """
        if seconds == _AWAITING:
            # Only a node that holds a message waits for a reply.
            self._busy_until = self._now() + BUSY_FOR
            seconds = LOOK
        elif seconds == _IDLE and self._now() < self._busy_until:
            seconds = POLL
        self._sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def poll_while_busy() -> bool:
    """Shorten the pauses of Flower's node in this process; False where this release lacks the patched code."""
    from flwr.supernode import start_client_internal as node

    if getattr(node, "time", None) is not time:
        return False
    vars(node)["time"] = NodeClock()
    return True
