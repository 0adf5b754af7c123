"""Who wants to see a run's progress says so here; the loop tells, and never waits for the answer."""

from __future__ import annotations

from collections.abc import Iterator
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


class Silent:
    """The listener of a run that nobody watches."""

    def start(self, total_rounds: int, done: int = 0) -> None:
        """Say nothing."""

    def site(self, server_round: int, site: str, done: int, total: int) -> None:
        """Say nothing."""

    def round(self, line: dict[str, Any]) -> None:
        """Say nothing."""


_listener: ContextVar[Listener | None] = ContextVar("fedge_progress", default=None)


def current() -> Listener:
    """The listener of this context."""
    return _listener.get() or Silent()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Make ``listener`` the one that is told, within the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
