"""How long a piece of work takes, and how much memory the process has held."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_MIN_RUNS: Final = 10


def timed(work: Callable[[], object], runs: int, seconds: float) -> list[float]:
    """Milliseconds of each run, after a tenth as many (at most 20) that are not counted.

    Args:
        work: what is timed.
        runs: to be timed.
        seconds: after which no further run is, once there are 10.
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
    """The smallest time that at least ``percent`` of all do not exceed, to the microsecond."""
    ordered = sorted(times)
    return round(ordered[-(-len(ordered) * percent // 100) - 1], 4)


def peak_rss_mb() -> float:
    """The most memory that this process held, in MB of 10^6 bytes."""
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
