"""The order in which a site visits its rows: an endless stream of batches, indexed by step.

Epoch ``e`` is a permutation seeded by (seed, site, e) alone; its last batch may be shorter.
Round r with K steps takes steps (r-1)K to rK-1, so the iterator keeps its place across rounds without any state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from fedge.client.data.seeding import generator


def steps_of_epoch(rows: int, batch_size: int) -> int:
    """The number of batches that visit every row once."""
    return -(-rows // batch_size)


def batches(
    *, seed: int, site: str, rows: int, batch_size: int, first: int, steps: int
) -> Iterator[NDArray[Any]]:
    """Row indices of steps ``first`` to ``first + steps - 1``.

    Args:
        seed: of the run.
        site: its name; each site has its own order.
        rows: number of training rows, at least 1.
        batch_size: rows a step, at least 1.
        first: index of the first step in the stream, from 0.
        steps: number of steps.

    Yields:
        Indices ``(b,)``, int64, with ``1 <= b <= batch_size``.
    """
    length = steps_of_epoch(rows, batch_size)
    epoch, order = -1, None
    for step in range(first, first + steps):
        if order is None or step // length != epoch:
            epoch = step // length
            order = generator(seed, site, "batches", epoch).permutation(rows)
        start = step % length * batch_size
        yield order[start : start + batch_size]
