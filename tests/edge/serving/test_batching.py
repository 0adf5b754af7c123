from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fedge.edge.serving.batching import Batcher
from fedge.edge.serving.usage_counters import Counts
from fedge.shared.errors import BundleError, FedgeError, InputError

Array = np.ndarray[Any, Any]
FAR = 1e9


class Network:
    """Doubles its rows, when it may; notes the sizes of its runs."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.begun = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.fails: Callable[[Array], Exception | None] = lambda x: None
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0

    def __call__(self, x: Array) -> Array:
        with self.lock:
            self.runs.append(len(x))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.begun.release()
        assert self.gate.acquire(timeout=60)
        with self.lock:
            self.at_once -= 1
        if (error := self.fails(x)) is not None:
            raise error
        with np.errstate(over="ignore"):
            return x * 2

    def open(self) -> None:
        self.gate.release(1000)


def batcher(network: Network, **changes: Any) -> Batcher:
    options = {"max_batch": 8, "max_queue": 16, "delay": 0.0, "counts": Counts()} | changes
    return Batcher(network, **options)


def row(value: float, n: int = 1) -> Array:
    return np.full((n, 2), value, np.float32)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def outcome(call: Callable[[], Array]) -> Any:
    try:
        return call()
    except Exception as error:
        return error


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def pool() -> Any:
    with ThreadPoolExecutor(40) as found:
        yield found


def ask(
    pool: ThreadPoolExecutor, b: Batcher, x: Array, seconds: float = FAR, alive: bool = True
) -> Any:
    return pool.submit(
        lambda: outcome(lambda: b.infer(x, time.monotonic() + seconds, lambda: alive))
    )


def test_what_waits_together_runs_together_and_everybody_gets_his_own(
    network: Network, pool: ThreadPoolExecutor
) -> None:
    b = batcher(network)
    first = ask(pool, b, row(0))
    assert network.begun.acquire(timeout=60)
    others = []
    for i in range(1, 6):
        others.append(ask(pool, b, row(i, n=2)))
        wait_for(lambda i=i: b.waiting == i)
    network.open()
    np.testing.assert_array_equal(first.result(60), row(0))
    for i, other in enumerate(others, 1):
        np.testing.assert_array_equal(other.result(60), row(2 * i, n=2))
    # Five requests of two rows, eight rows at most in a run.
    assert network.runs == [1, 8, 2]
    assert b.waiting == 0


def test_a_request_is_never_split_nor_overtaken(network: Network, pool: ThreadPoolExecutor) -> None:
    b = batcher(network)
    found = [ask(pool, b, row(0))]
    assert network.begun.acquire(timeout=60)
    for waiting, n in enumerate((5, 4, 1), 1):
        found.append(ask(pool, b, row(n, n)))
        wait_for(lambda waiting=waiting: b.waiting == waiting)
    network.open()
    assert [len(f.result(60)) for f in found] == [1, 5, 4, 1]
    assert network.runs == [1, 5, 5]


def test_a_full_queue_refuses_and_goes_on(network: Network, pool: ThreadPoolExecutor) -> None:
    b = batcher(network, max_queue=2)
    found = [ask(pool, b, row(1))]
    assert network.begun.acquire(timeout=60)
    found += [ask(pool, b, row(1)) for _ in range(2)]
    wait_for(lambda: b.waiting == 2)
    refused = outcome(lambda: b.infer(row(1), FAR, lambda: True))
    assert isinstance(refused, InputError)
    assert refused.code == 808
    network.open()
    for f in found:
        np.testing.assert_array_equal(f.result(60), row(2))
    np.testing.assert_array_equal(b.infer(row(3), FAR, lambda: True), row(6))


def test_disconnected_clients_leave_their_places_in_a_full_queue(
    network: Network, pool: ThreadPoolExecutor
) -> None:
    b = batcher(network, max_queue=2)
    first = ask(pool, b, row(1))
    assert network.begun.acquire(timeout=60)
    disconnected = [ask(pool, b, row(1), alive=False) for _ in range(2)]
    wait_for(lambda: b.waiting == 2)
    late = ask(pool, b, row(4))
    assert [g.result(60).code for g in disconnected] == [809, 809]
    network.open()
    np.testing.assert_array_equal(first.result(60), row(2))
    np.testing.assert_array_equal(late.result(60), row(8))
    assert network.runs == [1, 1]


def test_a_request_that_waits_beyond_its_deadline_fails_and_is_not_run(
    network: Network, pool: ThreadPoolExecutor
) -> None:
    b = batcher(network)
    first = ask(pool, b, row(1), seconds=1.0)
    assert network.begun.acquire(timeout=60)
    over = time.monotonic() + 1.0
    late = ask(pool, b, row(2), seconds=0.05)
    assert late.result(60).code == 809
    assert b.waiting == 0
    time.sleep(max(0.0, over - time.monotonic()))
    network.open()
    # What was begun in time is answered.
    np.testing.assert_array_equal(first.result(60), row(2))
    assert network.runs == [1]
    assert outcome(lambda: b.infer(row(1), time.monotonic() - 1, lambda: True)).code == 809
    assert outcome(lambda: b.infer(row(1), FAR, lambda: False)).code == 809
    assert network.runs == [1]


def test_a_failing_run_is_tried_request_by_request(
    network: Network, pool: ThreadPoolExecutor
) -> None:
    b = batcher(network)
    network.fails = lambda x: BundleError(708, "no") if (x == 3).any() else None
    found = [ask(pool, b, row(0))]
    assert network.begun.acquire(timeout=60)
    for i in range(1, 5):
        found.append(ask(pool, b, row(i)))
        wait_for(lambda i=i: b.waiting == i)
    network.open()
    results = [f.result(60) for f in found]
    assert isinstance(results[3], FedgeError)
    assert results[3].code == 708
    for i in (0, 1, 2, 4):
        np.testing.assert_array_equal(results[i], row(2 * i))


def test_what_is_not_finite_is_refused_alone(network: Network, pool: ThreadPoolExecutor) -> None:
    b = batcher(network)
    found = [ask(pool, b, row(0))]
    assert network.begun.acquire(timeout=60)
    bad = np.array([[1.0, 1.0], [1.0, 3e38]], np.float32)
    for waiting, x in enumerate((row(1), bad, row(2)), 1):
        found.append(ask(pool, b, x))
        wait_for(lambda waiting=waiting: b.waiting == waiting)
    network.open()
    results = [f.result(60) for f in found]
    assert results[2].code == 709
    assert results[2].message.startswith("row 1:")
    np.testing.assert_array_equal(results[1], row(2))
    np.testing.assert_array_equal(results[3], row(4))


def test_a_defect_fails_all_requests_of_its_run_and_no_others(
    network: Network, pool: ThreadPoolExecutor
) -> None:
    b = batcher(network)
    network.fails = lambda x: MemoryError() if len(x) == 2 else None
    found = [ask(pool, b, row(0))]
    assert network.begun.acquire(timeout=60)
    found += [ask(pool, b, row(1)) for _ in range(2)]
    wait_for(lambda: b.waiting == 2)
    network.open()
    results = [f.result(60) for f in found]
    assert [type(r) for r in results[1:]] == [MemoryError, MemoryError]
    np.testing.assert_array_equal(b.infer(row(5), FAR, lambda: True), row(10))


def test_a_delay_gathers_until_the_batch_is_full(
    network: Network, pool: ThreadPoolExecutor
) -> None:
    network.open()
    b = batcher(network, max_batch=4, delay=1000.0)
    found = [ask(pool, b, row(i)) for i in range(4)]
    for i, f in enumerate(found):
        np.testing.assert_array_equal(f.result(60), row(2 * i))
    assert network.runs == [4]
    b = batcher(network, max_batch=4, delay=0.05)
    start = time.monotonic()
    b.infer(row(1), FAR, lambda: True)
    assert 0.045 < time.monotonic() - start < 60


@pytest.mark.parametrize("parallel", [1, 3])
def test_no_more_runs_at_once_than_allowed(
    network: Network, pool: ThreadPoolExecutor, parallel: int
) -> None:
    b = batcher(network, parallel=parallel, max_batch=1)
    found = [ask(pool, b, row(i)) for i in range(10)]
    for _ in range(parallel):
        assert network.begun.acquire(timeout=60)
    wait_for(lambda: b.waiting == 10 - parallel)
    network.open()
    for i, f in enumerate(found):
        np.testing.assert_array_equal(f.result(60), row(2 * i))
    assert network.most_at_once == parallel


def test_runs_share_what_waits(network: Network, pool: ThreadPoolExecutor) -> None:
    b = batcher(network, parallel=2)
    found = [ask(pool, b, row(i)) for i in range(2)]
    for _ in range(2):
        assert network.begun.acquire(timeout=60)
    for i in range(2, 7):
        found.append(ask(pool, b, row(i)))
        wait_for(lambda i=i: b.waiting == i - 1)
    network.gate.release()
    assert network.begun.acquire(timeout=60)
    # Of five that waited, three: the other run has the rest.
    assert (network.runs, b.waiting) == ([1, 1, 3], 2)
    network.open()
    for i, f in enumerate(found):
        np.testing.assert_array_equal(f.result(60), row(2 * i))


def test_threads_of_its_own_come_with_need_and_end_with_it(
    network: Network, pool: ThreadPoolExecutor
) -> None:
    def own() -> int:
        return sum(thread.name == "fedge-model" for thread in threading.enumerate())

    before = own()
    b = batcher(network, parallel=2)
    network.open()
    for i in range(20):
        b.infer(row(i), FAR, lambda: True)
    assert own() == before  # no two requests met
    for _ in range(5):
        found = [ask(pool, b, row(i)) for i in range(30)]
        for f in found:
            f.result(60)
    assert before <= own() <= before + 2
    b.close()
    wait_for(lambda: own() == before)
    np.testing.assert_array_equal(b.infer(row(1), FAR, lambda: True), row(2))


@pytest.mark.slow
def test_a_refusal_costs_no_run(network: Network, pool: ThreadPoolExecutor) -> None:
    b = batcher(network, parallel=2, max_queue=1, max_batch=2, delay=1.0)
    first = ask(pool, b, row(1))
    wait_for(lambda: b.waiting == 1)
    assert outcome(lambda: b.infer(row(2), FAR, lambda: True)).code == 808
    assert network.begun.acquire(timeout=60)
    second = ask(pool, b, row(3))
    assert network.begun.acquire(timeout=60)  # beside the first
    network.open()
    np.testing.assert_array_equal(first.result(60), row(2))
    np.testing.assert_array_equal(second.result(60), row(6))


def test_without_more_threads_requests_go_on(
    network: Network, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    b = batcher(network)
    first = ask(pool, b, row(1))
    assert network.begun.acquire(timeout=60)
    late = ask(pool, b, row(2), seconds=2.0)
    wait_for(lambda: b.waiting == 1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        network.open()
        np.testing.assert_array_equal(first.result(60), row(2))
    assert late.result(60).code == 809
    np.testing.assert_array_equal(b.infer(row(3), FAR, lambda: True), row(6))


@pytest.mark.slow
def test_many_threads_with_deadlines_lose_nothing() -> None:
    """Promotions, time-outs and departures in every order: each request ends, with its rows or 809."""
    random = np.random.default_rng(0)

    def work(x: Array) -> Array:
        time.sleep(0.0005)
        return x * 2

    b = Batcher(work, max_batch=4, max_queue=8, delay=0.0, counts=Counts())
    cases = [
        (
            i,
            int(random.integers(1, 4)),
            float(random.choice([0.0005, 0.002, 60])),
            random.random() < 0.9,
        )
        for i in range(2000)
    ]
    sure = {i for i, _, seconds, alive in cases if seconds == 60 and alive}

    def one(i: int, n: int, seconds: float, alive: bool) -> Any:
        while True:
            result = outcome(lambda: b.infer(row(i, n), time.monotonic() + seconds, lambda: alive))
            if not isinstance(result, InputError) or result.code != 808:
                return result
            time.sleep(0.002)

    # At most two too many for the queue.
    with ThreadPoolExecutor(11) as pool:
        found = [pool.submit(one, *case) for case in cases]
        for (i, n, _, _), f in zip(cases, found, strict=True):
            result = f.result(60)
            if isinstance(result, InputError):
                assert result.code == 809
                assert i not in sure
            else:
                np.testing.assert_array_equal(result, row(2 * i, n))
    assert len(sure) > 400
    assert b.waiting == 0
    np.testing.assert_array_equal(b.infer(row(1), FAR, lambda: True), row(2))
