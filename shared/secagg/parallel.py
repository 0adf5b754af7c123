"""Work on independent pieces, shared among the processor's cores by threads: NumPy and OpenSSL let go of Python's lock.

Every piece is computed as one thread alone would compute it, so results do not depend on the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from numpy.typing import NDArray

#: Most threads; memory is busy before.
MAX_THREADS: Final = 8


class _Pool:
    """Threads that are started when first needed, and again in a forked process, which has none of its parent's."""

    def __init__(self) -> None:
        # Of the machine's cores those that this process may run on, where the system tells them.
        own = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        self.threads = min(MAX_THREADS, len(own(0)))
        self._executor: ThreadPoolExecutor | None = None
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._executor = None

    def get(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(MAX_THREADS - 1, "fedge-secagg")
        return self._executor


class _Scratch(threading.local):
    memory: NDArray[np.uint8] = np.empty(0, np.uint8)


_SCRATCH: Final = _Scratch()
_POOL: Final = _Pool()


def threads() -> int:
    """How many threads work: one a core, up to ``MAX_THREADS``, where nobody set another number."""
    return _POOL.threads


def use_threads(count: int) -> int:
    """How many threads work from now on in this process, 1 to ``MAX_THREADS``; returns how many did until now.

    Raises:
        ValueError: out of range.
    """
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"count: must be 1 to {MAX_THREADS}, got {count}")
    before, _POOL.threads = _POOL.threads, count
    return before


def each(count: int, work: Callable[[range], None]) -> None:
    """Let ``work`` do the pieces 0 to ``count`` - 1, in one thread or several; returns when all are done.

    Args:
        count: pieces.
        work: does the pieces of a range; what it raises is raised here, when the others have ended.
    """
    taking = min(_POOL.threads, count)
    if taking < 2:
        work(range(count))
        return
    others = [_POOL.get().submit(work, range(k, count, taking)) for k in range(1, taking)]
    try:
        work(range(0, count, taking))
    finally:
        # The caller's memory is theirs until they end.
        errors = [future.exception() for future in others]
    for error in errors:
        if error is not None:
            raise error


def scratch(size: int) -> NDArray[np.uint8]:
    """So many bytes of this thread's own, which hold anything and are kept for the next call.

    New memory would cost more than what is done in it: each of its pages has to be asked for.
    """
    if _SCRATCH.memory.size < size:
        _SCRATCH.memory = np.empty(size, np.uint8)
    return _SCRATCH.memory[:size]
