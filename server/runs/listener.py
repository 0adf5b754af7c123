"""Observers of a run's progress: the round loop notifies the listener of its context, and never waits for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol


class Listener(Protocol):
    """Events of the round loop."""

    def start(self, total_rounds: int, done: int = 0) -> None:
        """A run of ``total_rounds`` begins, or goes on after ``done`` of them."""

    def site(self, server_round: int, site: str, done: int, total: int) -> None:
        """A site's reply has arrived, ``done`` of ``total`` in this exchange."""

    def round(self, line: dict[str, Any]) -> None:
        """A round is committed; ``line`` is what rounds.jsonl holds."""

    def sent(self, server_round: int, done: int, total: int, nbytes: int) -> None:
        """Requests are out, ``done`` of ``total`` in this exchange, ``nbytes`` in all so far."""

    def waiting(self, server_round: int, phase: str, sites: Sequence[str], seconds: float) -> None:
        """No reply has come for a while; called every 15 s or more often.

        Args:
            server_round: 0 before the first.
            phase: ``connect``, ``register``, ``train``, ``evaluate``, ``calibrate``, ``qualify``, or ``superlink``
                while that does not answer.
            sites: whose replies are missing; none where it is not known which sites will connect.
            seconds: since this phase began.
        """

    def disconnected(self, server_round: int, site: str, seconds: float) -> None:
        """A site has disconnected, ``seconds`` after its request was sent; called once."""

    def reconnected(self, server_round: int, site: str, seconds: float) -> None:
        """A disconnected site is connected again after ``seconds``."""


class NullListener:
    """A listener that ignores every event; base class of those that handle only some."""

    def start(self, total_rounds: int, done: int = 0) -> None:
        """Ignore the event."""

    def site(self, server_round: int, site: str, done: int, total: int) -> None:
        """Ignore the event."""

    def round(self, line: dict[str, Any]) -> None:
        """Ignore the event."""

    def sent(self, server_round: int, done: int, total: int, nbytes: int) -> None:
        """Ignore the event."""

    def waiting(self, server_round: int, phase: str, sites: Sequence[str], seconds: float) -> None:
        """Ignore the event."""

    def disconnected(self, server_round: int, site: str, seconds: float) -> None:
        """Ignore the event."""

    def reconnected(self, server_round: int, site: str, seconds: float) -> None:
        """Ignore the event."""


_listener: ContextVar[Listener | None] = ContextVar("fedge_progress", default=None)


def current() -> Listener | None:
    """The listener of this context, None where none was set."""
    return _listener.get()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Make ``listener`` the listener of this context, within the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
