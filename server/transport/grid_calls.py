"""Calls of Flower's Grid that neither hang nor end the run while the SuperLink restarts.

Flower repeats a call over HTTP for as long as it fails, inside the call and without a limit, so a call may block for
the whole outage. Each therefore runs in a thread of its own, and the caller goes on reporting that it waits.
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
#: HTTP status codes that mean "try again later": timeout, too early, too many requests; and all from 500 on.
_TRANSIENT_STATUS = (408, 425, 429)
#: Modules whose exceptions mean a failing connection: the HTTP client, and Flower's transfer of large messages.
_TRANSIENT_MODULES = ("httpx", "httpcore", "flwr.supercore.inflatable")


@runtime_checkable
class TimedGrid(Protocol):
    """A grid that knows how long a site took: a simulation, in which sites take part one after the other."""

    def elapsed(self, reply: Message) -> float:
        """Seconds from the request to this reply."""
        ...


@dataclass(frozen=True)
class Clock:
    """The clock of the round loop, in seconds; tests use one that passes no real time."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Timeouts:
    """Timeouts and intervals of the round loop, in seconds unless said otherwise.

    Attributes:
        probe_after: time without a reply until a site is probed, and between two probes of a site.
        probe_life: time until an unanswered probe is given up; doubled each time, up to eight times.
        listing: interval between two calls that list the connected nodes.
        reporting: interval between two progress reports to the listener.
        outage: how long a failing SuperLink may take beyond an exchange's deadline.
        max_retries: maximum number of times that a request is sent again, per site and exchange.
        large: size in bytes above which requests are sent one by one.
        registration, joining: time for replies to a registration, at the start and later on.
        joining_again: minimum interval between two registration requests to new nodes.
    """

    probe_after: float = 10.0
    probe_life: float = 30.0
    listing: float = 5.0
    reporting: float = 10.0
    outage: float = 60.0
    max_retries: int = 30
    large: int = 8 * 2**20
    registration: float = 90.0
    joining: float = 30.0
    joining_again: float = 60.0


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: the connection failed, and the call was neither refused nor wrong."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in _TRANSIENT_STATUS
    return is_call_failure(error)


def is_call_failure(error: BaseException) -> bool:
    """Whether an error comes from the call itself, a refused one included, and not from the content it returned."""
    if isinstance(error, OSError):
        return True
    modules = (kind.__module__ for kind in type(error).__mro__)
    return isinstance(error, Exception) and any(
        m == root or m.startswith(f"{root}.") for m in modules for root in _TRANSIENT_MODULES
    )


@dataclass
class GridClient:
    """A client of Flower's Grid that retries calls while the SuperLink does not answer.

    Attributes:
        grid: Flower's grid.
        clock: the source of time.
        timeouts: how long calls may take.
        failing_since: time of the first failure, by the clock, while the SuperLink does not answer; else None.
    """

    grid: Grid
    clock: Clock = field(default_factory=Clock)
    timeouts: Timeouts = field(default_factory=Timeouts)
    failing_since: float | None = None

    @property
    def direct(self) -> bool:
        """Whether the grid is in this process: nothing is lost there, and calls are plain calls."""
        return isinstance(self.grid, TimedGrid)

    def call(
        self, operation: str, function: Callable[[], _T], until: float, tick: Callable[[], None]
    ) -> _T:
        """Call the grid, and retry while the connection fails.

        Args:
            operation: name of the call, for messages.
            function: the call; it may be repeated.
            until: when to give up, by the clock; an outage may take ``timeouts.outage`` seconds in any case.
            tick: called now and then while this waits.

        Returns:
            What ``function`` returns.

        Raises:
            RunError: 501, the SuperLink did not answer in time.
        """
        if self.direct:
            return function()
        pause = _FIRST_PAUSE
        started = self.clock.now()
        while True:
            try:
                result = self._watched(
                    operation, function, max(until, started + self._outage), tick
                )
            except Exception as error:
                since = self.note_failure(operation, error)
                left = max(until, since + self._outage) - self.clock.now()
                if left <= 0:
                    raise self._unanswered(operation, brief(error)) from error
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

    def note_failure(self, operation: str, error: BaseException) -> float:
        """Record that a call failed because of the connection to the SuperLink.

        Args:
            operation: name of the call, for the log.
            error: what the call raised.

        Returns:
            Time of the first failure of this outage in seconds, by ``clock.now``.

        Raises:
            BaseException: ``error`` itself, where it is not transient (see ``is_transient``).
        """
        if not is_transient(error):
            raise error
        if self.failing_since is None:
            self.failing_since = self.clock.now()
            _log.warning("the SuperLink fails (%s): %s", operation, brief(error))
        return self.failing_since

    @property
    def _outage(self) -> float:
        return self.timeouts.outage

    def _unanswered(self, operation: str, reason: str) -> RunError:
        since = self.clock.now() - (self.failing_since or self.clock.now())
        return RunError(
            501, f"SuperLink: must answer ({operation}), got {reason} for {since:.0f} s"
        )

    def _watched(
        self, operation: str, function: Callable[[], _T], until: float, tick: Callable[[], None]
    ) -> _T:
        result: list[_T] = []
        raised: list[BaseException] = []
        finished = threading.Event()

        def work() -> None:
            try:
                result.append(function())
            except BaseException as error:  # raised again in the calling thread
                raised.append(error)
            finally:
                finished.set()

        started = self.clock.now()
        threading.Thread(target=work, name=f"grid-{operation}", daemon=True).start()
        while not finished.wait(_GLANCE):
            now = self.clock.now()
            if self.failing_since is None and now - started > self.timeouts.listing:
                # Flower repeats a failing call by itself: only the time that it takes shows the failure.
                self.failing_since = started
            if now >= until:
                raise self._unanswered(operation, "no answer")
            tick()
        if raised:
            raise raised[0]
        return result[0]


def no_op(*_: Any) -> None:
    """Do nothing; the default of a callback."""
