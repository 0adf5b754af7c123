from __future__ import annotations

import time

from fedge.edge.backends import timing


def test_percentiles_are_of_the_nearest_rank() -> None:
    times = [float(n) for n in range(100, 0, -1)]
    assert (timing.percentile(times, 50), timing.percentile(times, 99)) == (50.0, 99.0)
    assert (timing.percentile([3.0], 50), timing.percentile([3.0], 99)) == (3.0, 3.0)


def test_timing_ends_when_its_time_is_over() -> None:
    assert len(timing.timed(lambda: time.sleep(0.01), 1000, 0.01)) == 10
    assert len(timing.timed(lambda: None, 25, 60)) == 25


def test_memory_is_that_of_this_process() -> None:
    assert 10 < timing.peak_rss_mb() < 100_000
