"""Who wants to see a run's progress says so here; the loop tells, and never waits for the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol


class Listener(Protocol):
    """What the round loop tells."""

    def start(self, total_rounds: int, done: int = 0) -> None:
        """A run of ``total_rounds`` begins, or goes on after ``done`` of them."""

    def site(self, server_round: int, site: str, done: int, total: int) -> None:
        """A site's reply has arrived, ``done`` of ``total`` in this exchange."""

    def round(self, line: dict[str, Any]) -> None:
        """A round is committed; ``line`` is what rounds.jsonl holds."""

    def sent(self, server_round: int, done: int, total: int, nbytes: int) -> None:
        """Requests are out, ``done`` of ``total`` in this exchange, ``nbytes`` in all so far."""

    def waiting(self, server_round: int, phase: str, sites: Sequence[str], seconds: float) -> None:
        """Nothing has come for a while; told every 15 s or more often.

        Args:
            server_round: 0 before the first.
            phase: ``connect``, ``register``, ``train``, ``evaluate``, ``calibrate``, ``qualify``, or ``superlink``
                while that does not answer.
            sites: that are waited for; none where it is not known who will come.
            seconds: since this phase began.
        """

    def lost(self, server_round: int, site: str, seconds: float) -> None:
        """A site is no longer connected, ``seconds`` after it was asked; told once."""

    def back(self, server_round: int, site: str, seconds: float) -> None:
        """A lost site is connected again after ``seconds``."""


class Silent:
    """The listener of a run that nobody watches; the base of one that wants to hear of a few things only."""

    def start(self, total_rounds: int, done: int = 0) -> None:
        """Say nothing."""

    def site(self, server_round: int, site: str, done: int, total: int) -> None:
        """Say nothing."""

    def round(self, line: dict[str, Any]) -> None:
        """Say nothing."""

    def sent(self, server_round: int, done: int, total: int, nbytes: int) -> None:
        """Say nothing."""

    def waiting(self, server_round: int, phase: str, sites: Sequence[str], seconds: float) -> None:
        """Say nothing."""

    def lost(self, server_round: int, site: str, seconds: float) -> None:
        """Say nothing."""

    def back(self, server_round: int, site: str, seconds: float) -> None:
        """Say nothing."""


_listener: ContextVar[Listener | None] = ContextVar("fedge_progress", default=None)


def current() -> Listener | None:
    """The listener of this context, None where none was set."""
    return _listener.get()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Make ``listener`` the one that is told, within the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
