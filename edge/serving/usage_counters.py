"""Counters of the server, kept whether or not they are exported."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

#: Upper bounds, in seconds, of the classes of a request's time.
SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
#: Upper bounds of the classes of a run's rows.
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Snapshot:
    """The counts at one moment.

    Attributes:
        requests: by outcome, ``"OK"`` or an error's label such as ``"FE-804"``.
        latency: requests by class of ``SECONDS``, the last those above; of all outcomes.
        seconds: sum over all requests.
        failed_seconds: sum over those that were refused or failed.
        batches: runs by class of ``ROWS``, the last those above.
        rows: sum over all runs.
        ran: requests in all runs.
        waited: seconds that requests waited for their run, in sum.
        computed: seconds of all runs.
        last: when the model last ran, in seconds since 1970; 0 before that.
        reloads: of the bundle, by ``"swapped"`` and ``"refused"``.
    """

    requests: dict[str, int]
    latency: tuple[int, ...]
    seconds: float
    failed_seconds: float
    batches: tuple[int, ...]
    rows: int
    ran: int
    waited: float
    computed: float
    last: float
    reloads: dict[str, int]


@dataclass
class Counts:
    """Counts that many threads add to."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _requests: Counter[str] = field(default_factory=Counter)
    _latency: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    _seconds: float = 0.0
    _failed_seconds: float = 0.0
    _batches: list[int] = field(default_factory=lambda: [0] * (len(ROWS) + 1))
    _rows: int = 0
    _ran: int = 0
    _waited: float = 0.0
    _computed: float = 0.0
    _last: float = 0.0
    _reloads: Counter[str] = field(default_factory=Counter)

    def answered(self, outcome: str, seconds: float) -> None:
        """Record a finished request.

        Args:
            outcome: ``"OK"`` or an error's label.
            seconds: that it took.
        """
        with self._lock:
            self._requests[outcome] += 1
            self._latency[bisect_left(SECONDS, seconds)] += 1
            self._seconds += seconds
            if outcome != "OK":
                self._failed_seconds += seconds

    def ran(self, requests: int, rows: int, waited: float, seconds: float) -> None:
        """Record a run of the model.

        Args:
            requests: in the batch.
            rows: of the batch.
            waited: seconds that its requests waited, in sum.
            seconds: of the run.
        """
        with self._lock:
            self._batches[bisect_left(ROWS, rows)] += 1
            self._rows += rows
            self._ran += requests
            self._waited += waited
            self._computed += seconds
            self._last = time.time()

    def reloaded(self, outcome: str) -> None:
        """Record a reload by its outcome, ``"swapped"`` or ``"refused"``."""
        with self._lock:
            self._reloads[outcome] += 1

    def snapshot(self) -> Snapshot:
        """All counts at one moment."""
        with self._lock:
            return Snapshot(
                dict(self._requests),
                tuple(self._latency),
                self._seconds,
                self._failed_seconds,
                tuple(self._batches),
                self._rows,
                self._ran,
                self._waited,
                self._computed,
                self._last,
                dict(self._reloads),
            )
