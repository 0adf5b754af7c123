from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.client.training.batches import batches, steps_of_epoch


def stream(first: int, steps: int, rows: int = 10, batch_size: int = 4, site: str = "a", seed=1):
    found = batches(
        seed=seed, site=site, rows=rows, batch_size=batch_size, first=first, steps=steps
    )
    return [b.tolist() for b in found]


@pytest.mark.slow
@given(
    rows=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    cuts=st.lists(st.integers(1, 9), max_size=5),
)
def test_rounds_continue_the_one_stream(rows, batch_size, cuts):
    whole = stream(0, sum(cuts), rows, batch_size)
    parts, first = [], 0
    for steps in cuts:
        parts += stream(first, steps, rows, batch_size)
        first += steps
    assert parts == whole


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 50), epoch=st.integers(0, 5))
def test_every_epoch_visits_every_row_once(rows, batch_size, epoch):
    length = steps_of_epoch(rows, batch_size)
    visited = stream(epoch * length, length, rows, batch_size)
    assert sorted(row for batch in visited for row in batch) == list(range(rows))
    assert all(len(batch) == min(batch_size, rows) for batch in visited[:-1])


def test_last_batch_of_an_epoch_is_short_and_kept():
    assert [len(b) for b in stream(0, 6)] == [4, 4, 2, 4, 4, 2]


def test_epochs_sites_and_seeds_differ():
    assert stream(0, 3, 100) != stream(25, 3, 100)
    assert stream(0, 3, 100) != stream(0, 3, 100, site="b")
    assert stream(0, 3, 100) != stream(0, 3, 100, seed=2)


def test_a_far_step_costs_no_walk():
    far = batches(seed=1, site="a", rows=10, batch_size=3, first=10**12, steps=10**6)
    assert np.concatenate(list(islice(far, 2))).max() < 10
