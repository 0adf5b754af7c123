"""Pieces among threads: each is done once, errors come out, a forked process has threads of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from fedge.shared.secagg import parallel


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = parallel.use_threads(3)
    yield
    parallel.use_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17])
def test_each_piece_is_done_once(count: int) -> None:
    done: list[int] = []
    parallel.each(count, lambda some: done.extend(some))
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_what_a_piece_raises_is_raised_when_all_have_ended(bad: int) -> None:
    done: list[int] = []

    def work(some: range) -> None:
        if bad in some:
            raise ValueError("a bad piece")
        done.extend(some)

    with pytest.raises(ValueError, match="a bad piece"):
        parallel.each(6, work)
    assert sorted(done) == [i for i in range(6) if i % 3 != bad]


@pytest.mark.parametrize("count", [0, parallel.MAX_THREADS + 1])
def test_other_numbers_of_threads_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="count: must be 1 to"):
        parallel.use_threads(count)
    assert parallel.threads() == 3


def test_a_forked_process_works_with_threads_of_its_own() -> None:
    parallel.each(3, lambda _: None)
    child = os.fork()
    if child == 0:
        done: list[int] = []
        parallel.each(6, lambda some: done.extend(some))
        os._exit(0 if sorted(done) == list(range(6)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_scratch_is_kept_and_grows() -> None:
    first = parallel.scratch(100)
    first.fill(7)
    assert first.size == 100
    assert parallel.scratch(50).tolist() == [7] * 50
    assert parallel.scratch(1000).size == 1000
