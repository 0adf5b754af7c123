"""Calls of Flower's Grid that neither hang nor end the run while the SuperLink restarts.

Flower repeats a call over HTTP for as long as it fails, inside the call and without a limit, so a call may block for
the whole outage. Each therefore runs in a thread of its own, and whoever waits for it goes on telling so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

from fedge.shared.errors import RunError, brief

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_FIRST_PAUSE, _LAST_PAUSE = 0.5, 5.0
#: How often a caller that waits for a call looks up, in seconds.
_GLANCE = 1.0
#: Answers of a server that is not itself at the moment: timeout, early, too many, and all from 500 on.
_PASSING_STATUS = (408, 425, 429)
#: Where exceptions of a failing line come from: the HTTP client, and Flower's transfer of large messages.
_PASSING_MODULES = ("httpx", "httpcore", "flwr.supercore.inflatable")


@runtime_checkable
class TimedGrid(Protocol):
    """A grid that knows how long a site took (a simulation, where sites wait for each other)."""

    def elapsed(self, reply: Message) -> float:
        """Seconds from the request to this reply."""
        ...


@dataclass(frozen=True)
class Clock:
    """Where the loop has its time from; tests have one that does not take any."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Timeouts:
    """How long the loop waits for what, in seconds unless said otherwise.

    Attributes:
        probe_after: without a reply, until a site is probed, and between two probes of a site.
        probe_life: until an unanswered probe is given up; doubled each time, up to eight times.
        listing: between two looks at who is online.
        telling: between two signs of life to the listener.
        outage: that a failing SuperLink may take beyond an exchange's deadline.
        pushes_again: most repetitions of a request, a site and exchange.
        large: bytes of a request from which on requests are sent one by one.
        registration, joining: for replies to a registration, at the start and later on.
        joining_again: between two invitations of nodes that are new.
    """

    probe_after: float = 10.0
    probe_life: float = 30.0
    listing: float = 5.0
    telling: float = 10.0
    outage: float = 60.0
    pushes_again: int = 30
    large: int = 8 * 2**20
    registration: float = 90.0
    joining: float = 30.0
    joining_again: float = 60.0


def passing(error: BaseException) -> bool:
    """Whether the same call may succeed later: a line that failed, not a call that is refused or wrong."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in _PASSING_STATUS
    return of_the_line(error)


def of_the_line(error: BaseException) -> bool:
    """Whether it comes from the call itself, one that is refused included, and not from what the call brought."""
    if isinstance(error, OSError):
        return True
    modules = (kind.__module__ for kind in type(error).__mro__)
    return isinstance(error, Exception) and any(
        m == root or m.startswith(f"{root}.") for m in modules for root in _PASSING_MODULES
    )


@dataclass
class GridClient:
    """A grid, and how patiently it is called.

    Attributes:
        direct: the grid is in this process: nothing is lost there, and calls are plain calls.
        failing_since: by the clock, while the SuperLink does not answer.
    """

    grid: Grid
    clock: Clock = field(default_factory=Clock)
    patience: Timeouts = field(default_factory=Timeouts)
    failing_since: float | None = None

    @property
    def direct(self) -> bool:
        """Whether the grid is in this process."""
        return isinstance(self.grid, TimedGrid)

    def call(
        self, what: str, function: Callable[[], _T], until: float, tick: Callable[[], None]
    ) -> _T:
        """Call the grid, again where the line fails.

        Args:
            what: is called, for the message.
            function: the call; it may be repeated.
            until: by the clock, when to give up; an outage may take ``patience.outage`` seconds in any case.
            tick: called now and then while this waits.

        Raises:
            RunError: 501, the SuperLink did not answer in time.
        """
        if self.direct:
            return function()
        pause = _FIRST_PAUSE
        started = self.clock.now()
        while True:
            try:
                result = self._watched(what, function, max(until, started + self._outage), tick)
            except Exception as error:
                since = self.note_failure(what, error)
                left = max(until, since + self._outage) - self.clock.now()
                if left <= 0:
                    raise self._unanswered(what, brief(error)) from error
            else:
                if self.failing_since is not None:
                    _log.info(
                        "the SuperLink answers again after %.0f s",
                        self.clock.now() - self.failing_since,
                    )
                self.failing_since = None
                return result
            tick()
            self.clock.sleep(min(pause, left))
            pause = min(pause * 2, _LAST_PAUSE)

    def note_failure(self, what: str, error: BaseException) -> float:
        """Since when the line fails, by the clock; what was raised goes on where it is no failure of the line."""
        if not passing(error):
            raise error
        if self.failing_since is None:
            self.failing_since = self.clock.now()
            _log.warning("the SuperLink fails (%s): %s", what, brief(error))
        return self.failing_since

    @property
    def _outage(self) -> float:
        return self.patience.outage

    def _unanswered(self, what: str, why: str) -> RunError:
        since = self.clock.now() - (self.failing_since or self.clock.now())
        return RunError(501, f"SuperLink: must answer ({what}), got {why} for {since:.0f} s")

    def _watched(
        self, what: str, function: Callable[[], _T], until: float, tick: Callable[[], None]
    ) -> _T:
        result: list[_T] = []
        raised: list[BaseException] = []
        over = threading.Event()

        def work() -> None:
            try:
                result.append(function())
            except BaseException as error:  # raised again where it is waited for
                raised.append(error)
            finally:
                over.set()

        started = self.clock.now()
        threading.Thread(target=work, name=f"grid-{what}", daemon=True).start()
        while not over.wait(_GLANCE):
            now = self.clock.now()
            if self.failing_since is None and now - started > self.patience.listing:
                # Flower repeats a failing call by itself: then only the time that it takes tells.
                self.failing_since = started
            if now >= until:
                raise self._unanswered(what, "no answer")
            tick()
        if raised:
            raise raised[0]
        return result[0]


def silent(*_: Any) -> None:
    """Tell nobody."""
