"""Batches concurrent requests.

A request that finds a run free runs at once, in its own thread, so that an idle server adds no thread switch. Requests
that arrive meanwhile wait, and a worker thread takes as many at a time as fit into a batch, until none waits. The same
thread goes on from run to run: one that had answered would still hold the interpreter, a sleeping one would have to
wake first, and the model would be idle for both.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.edge.serving.usage_counters import Counts
from fedge.shared.errors import BundleError, FedgeError, InputError

Array: TypeAlias = NDArray[Any]

_WAITS: Final = 0
_RUNS: Final = 1
_DONE: Final = 2


class _Pending:
    """One request on its way through the model."""

    __slots__ = ("alive", "deadline", "error", "logits", "ready", "since", "state", "wake")

    def __init__(self, ready: Array, deadline: float, alive: Callable[[], bool]) -> None:
        self.ready = ready
        self.deadline = deadline
        self.alive = alive
        self.since = time.monotonic()
        self.state = _WAITS
        self.wake = threading.Lock()
        self.wake.acquire()
        self.logits: Array | None = None
        self.error: Exception | None = None

    def result(self) -> Array:
        if self.error is not None:
            raise self.error
        assert self.logits is not None  # noqa: S101 - a request is done with one or the other
        return self.logits

    def done(self) -> None:
        self.state = _DONE
        self.wake.release()

    def fails(self, error: Exception) -> None:
        self.error = error
        self.done()


class Batcher:
    """Runs the model for several threads at once.

    Args:
        run: the model, from ``(n, *network shape)`` to ``(n, k)``; may raise ``FedgeError``.
        max_batch: most rows of one run; no request has more.
        max_queue: most requests that wait.
        delay: seconds that a run waits for more requests; 0 never waits.
        counts: records each run.
        parallel: most runs at once.
    """

    def __init__(
        self,
        run: Callable[[Array], Array],
        *,
        max_batch: int,
        max_queue: int,
        delay: float,
        counts: Counts,
        parallel: int = 1,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._delay = delay
        self._counts = counts
        self._lock = threading.Lock()
        self._arrival = threading.Condition(self._lock)
        self._queue: deque[_Pending] = deque()
        self._parallel = self._free = parallel
        #: Sleeping worker threads, each by the lock that wakes it.
        self._sleeping: list[threading.Lock] = []
        self._closed = False

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._queue)

    def infer(self, ready: Array, deadline: float, alive: Callable[[], bool]) -> Array:
        """Finite logits ``(n, k)`` of the rows ``ready``.

        Args:
            ready: ``(n, *network shape)`` of float32, n at most ``max_batch``.
            deadline: by the monotonic clock; the request is not begun afterwards.
            alive: whether the client still waits for the answer.

        Raises:
            InputError: 808, too many wait; 809, the deadline passed.
            BundleError: what ``run`` raises; 709, these rows' logits are not finite.
        """
        with self._lock:
            # Where runs are free the queue is empty: a finished run goes on with the queue, or hands over.
            alone = self._free > 0 and not self._delay
            if not alone:
                item = self._enter(ready, deadline, alive)
            if self._free:
                self._free -= 1
                if not alone:
                    self._hand_over()
        if alone:
            return self._run_alone(ready, deadline, alive)
        item.wake.acquire(timeout=max(0.0, deadline - time.monotonic()))
        with self._lock:
            if item.state != _DONE:
                if item.state == _WAITS:
                    self._queue.remove(item)
                raise _late()
        return item.result()

    def close(self) -> None:
        """End the sleeping worker threads; busy ones end when the queue is empty."""
        with self._lock:
            self._closed = True
            while self._sleeping:
                self._free -= 1  # the thread gives it back when it finds the queue empty
                self._sleeping.pop().release()

    def _run_alone(self, ready: Array, deadline: float, alive: Callable[[], bool]) -> Array:
        """Run a request that finds no other, with as little overhead as possible."""
        start = time.monotonic()
        try:
            if start >= deadline or not alive():
                raise _late()
            logits = self._run(ready)
        finally:
            with self._lock:
                if self._queue:
                    self._hand_over()
                else:
                    self._free += 1
        self._counts.ran(1, len(logits), 0.0, time.monotonic() - start)
        if not np.isfinite(logits).all():
            raise _not_finite(logits)
        return logits

    def _enter(self, ready: Array, deadline: float, alive: Callable[[], bool]) -> _Pending:
        if len(self._queue) >= self._max_queue:
            # Requests whose client has disconnected give up their places.
            self._queue = deque(other for other in self._queue if not self._given_up(other))
        if len(self._queue) >= self._max_queue:
            raise InputError(
                808, f"queue: must hold at most {self._max_queue} requests, it is full"
            )
        item = _Pending(ready, deadline, alive)
        self._queue.append(item)
        if self._delay:
            self._arrival.notify_all()
        return item

    def _given_up(self, item: _Pending) -> bool:
        """Whether the request has expired or its client has disconnected; then it fails."""
        if time.monotonic() < item.deadline and item.alive():
            return False
        item.fails(_late())
        return True

    def _hand_over(self) -> None:
        """Pass a taken run on to a worker thread."""
        if self._sleeping:
            self._sleeping.pop().release()
            return
        try:
            threading.Thread(target=self._work, name="fedge-model", daemon=True).start()
        except RuntimeError:
            # The system has no more threads: the next request runs alone, and tries again.
            self._free += 1

    def _work(self) -> None:
        """Run waiting requests until there are none, sleep, and repeat."""
        wake = threading.Lock()
        wake.acquire()
        batch: list[_Pending] = []
        while True:
            with self._lock:
                for item in batch:
                    item.done()
                batch = self._take()
                if not batch:
                    self._free += 1
                    if self._closed:
                        return
                    self._sleeping.append(wake)
            if not batch:
                wake.acquire()
                continue
            try:
                self._answer(batch)
            except Exception as error:
                for item in batch:
                    if item.logits is None and item.error is None:
                        item.error = error

    def _wait_for_more(self) -> None:
        first = self._queue[0]
        end = min(first.since + self._delay, first.deadline)
        while (left := end - time.monotonic()) > 0:
            # Other runs or expired requests may have emptied the queue meanwhile.
            rows = sum(len(item.ready) for item in self._queue)
            if not rows or rows >= self._max_batch:
                return
            self._arrival.wait(left)

    def _take(self) -> list[_Pending]:
        """Take waiting requests in order, up to the batch size and one run's share."""
        if self._delay and self._queue:
            self._wait_for_more()
        # The queue is shared with the other runs, each of which has a core of its own; a delay is a request for
        # large batches.
        share = len(self._queue) if self._delay else -(-len(self._queue) // self._parallel)
        batch: list[_Pending] = []
        rows = 0
        while self._queue and len(batch) < share:
            item = self._queue[0]
            if batch and rows + len(item.ready) > self._max_batch:
                break
            self._queue.popleft()
            if not self._given_up(item):
                item.state = _RUNS
                batch.append(item)
                rows += len(item.ready)
        return batch

    def _answer(self, batch: list[_Pending]) -> None:
        """Run a batch; where it fails as a whole, each request on its own."""
        start = time.monotonic()
        try:
            logits = self._run(
                batch[0].ready
                if len(batch) == 1
                else np.concatenate([item.ready for item in batch])
            )
        except FedgeError as error:
            if len(batch) == 1:
                batch[0].error = error
            else:
                for item in batch:
                    self._answer([item])
            return
        waited = sum(start - item.since for item in batch)
        self._counts.ran(len(batch), len(logits), waited, time.monotonic() - start)
        finite = bool(np.isfinite(logits).all())
        first = 0
        for item in batch:
            rows = logits[first : first + len(item.ready)]
            first += len(item.ready)
            if finite or np.isfinite(rows).all():
                item.logits = rows
            else:
                item.error = _not_finite(rows)


def _not_finite(logits: Array) -> BundleError:
    row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
    return BundleError(709, f"row {row}: must give finite logits, got NaN or infinity")


def _late() -> InputError:
    return InputError(809, "request: must be answered before its deadline, which has passed")
