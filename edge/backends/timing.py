"""Times a piece of work, and reads the peak memory of the process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_MIN_RUNS: Final = 10


def timed(work: Callable[[], object], runs: int, seconds: float) -> list[float]:
    """Time a function, after a warm-up of a tenth as many runs (at most 20).

    Args:
        work: function to time.
        runs: number of timed runs.
        seconds: limit after which no further run begins, once 10 are timed.

    Returns:
        Milliseconds of each timed run.
    """
    for _ in range(max(1, min(20, runs // 10))):
        work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < runs:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        times.append((now - start) * 1e3)
        if now > end and len(times) >= _MIN_RUNS:
            break
    return times


def percentile(times: list[float], percent: int) -> float:
    """The smallest time that at least ``percent`` of all do not exceed, to the microsecond.

    Args:
        times: milliseconds, in any order.
        percent: above 0, at most 100.
    """
    ordered = sorted(times)
    return round(ordered[-(-len(ordered) * percent // 100) - 1], 4)


def peak_rss_mb() -> float:
    """Peak resident memory of this process, in MB of 10^6 bytes."""
    # getrusage would count the parent's memory too, from before this program was started.
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
