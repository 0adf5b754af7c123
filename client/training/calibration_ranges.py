"""Which training examples a site looks at for the ranges, and what it sees in them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedge.client.data.seeding import generator
from fedge.client.training import graph_runs
from fedge.client.training.graph_runs import GraphFailedError, Terms
from fedge.shared.compile import ranges
from fedge.shared.compile.observe import observed
from fedge.shared.errors import SiteError

log = logging.getLogger(__name__)

#: Most bytes of examples, or of what is seen in them, that are held at a time.
PART_BYTES: Final = 64 * 2**20

_OUT_OF_RANGE, _FAILED = 401, 413


@dataclass(frozen=True)
class Seen:
    """How far the activations go in some examples, clipped.

    Attributes:
        counts: ``(tensors, 2, BINS)``, see ``ranges.histogram``.
        both: ``(tensors, 2)``, smallest and largest.
    """

    counts: NDArray[np.int64]
    both: NDArray[np.float64]


def rows(count: int, examples: int, seed: int, site: str, *, every: bool) -> NDArray[Any]:
    """Examples that are looked at: the same whenever the site is asked again.

    Args:
        count: that the site has.
        examples: that are asked for.
        seed: of the run.
        site: its name.
        every: look at all. Noise hides one example only where it decides of no other whether that is looked at, and
            in a draw of so many out of ``count`` each does.

    Returns:
        Their indices, upwards.
    """
    if every or count <= examples:
        return np.arange(count)
    # With the number in the draw, one more is another sample and not the same with one more.
    drawn = generator(seed, site, "calibrate", examples).permutation(count)
    return np.sort(drawn[:examples])


def seen(
    graph: bytes,
    tensors: tuple[str, ...],
    x: NDArray[Any],
    looked: NDArray[Any],
    bound: float,
    terms: Terms,
) -> Seen:
    """Look at examples, some at a time.

    Args:
        graph: the site's own, in fp32.
        tensors: of it.
        x: ``(n, ...)``, as the network takes them.
        looked: indices of those that are looked at, 1 or more.
        bound: to which activations are clipped.
        terms: the deadline is that of all examples together.

    Raises:
        SiteError: 401, an example or an activation is not finite; 413, the graph does not run, or not in time.
    """
    counts = np.zeros((len(tensors), ranges.SIDES, ranges.BINS), np.int64)
    both: list[NDArray[np.float64]] = []
    beyond = False
    try:
        for found in _extremes(observed(graph, tensors), len(tensors), x, looked, terms):
            kept, more = ranges.clipped(found, bound)
            counts += ranges.histogram(kept)
            both.append(ranges.merged(list(kept)))
            beyond |= more
    except GraphFailedError as error:
        raise SiteError(_FAILED, f"fp32 graph: {error}") from None
    except ValueError as error:
        raise SiteError(_OUT_OF_RANGE, str(error)) from None
    if beyond:
        log.warning("activations are clipped to %g", bound)
    return Seen(counts, ranges.merged(both))


def _extremes(
    graph: bytes, tensors: int, x: NDArray[Any], looked: NDArray[Any], terms: Terms
) -> Iterator[NDArray[np.float32]]:
    """``(m, tensors, 2)`` of one part after the other."""
    until = time.monotonic() + terms.deadline
    widest = max(x[:1].nbytes, 2 * tensors * np.dtype(np.float64).itemsize, 1)
    step = max(1, PART_BYTES // widest)
    for at in range(0, len(looked), step):
        part = x[looked[at : at + step]]
        # A runtime may take NaN for a number, as the larger of it and 0.
        if not np.isfinite(part).all():
            raise SiteError(_OUT_OF_RANGE, "examples: must be finite, got NaN or infinity")
        left = until - time.monotonic()
        if left <= 0:
            raise GraphFailedError(f"must be run within {terms.deadline:g} s")
        yield graph_runs.extremes(graph, part, tensors, Terms(left, terms.threads))
