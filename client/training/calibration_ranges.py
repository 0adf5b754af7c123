"""Selects training examples for the ranges of activations, and computes the ranges over them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedge.client.data.seeding import generator
from fedge.client.training import onnx_runs
from fedge.client.training.onnx_runs import GraphFailedError, Terms
from fedge.shared.compile import ranges
from fedge.shared.compile.activation_observer import observed
from fedge.shared.errors import SiteError

log = logging.getLogger(__name__)

#: Maximum bytes of examples, or of their activations' extremes, that are held at a time.
PART_BYTES: Final = 64 * 2**20

_OUT_OF_RANGE, _FAILED = 401, 413


@dataclass(frozen=True)
class ObservedRanges:
    """Ranges of activations over some examples, clipped.

    Attributes:
        counts: ``(tensors, 2, BINS)``, see ``ranges.histogram``.
        both: ``(tensors, 2)``, smallest and largest value.
    """

    counts: NDArray[np.int64]
    both: NDArray[np.float64]


def rows(count: int, examples: int, seed: int, site: str, *, every: bool) -> NDArray[Any]:
    """Indices of the examples that are used: the same whenever the request is repeated.

    Args:
        count: number of the site's examples.
        examples: number of requested examples.
        seed: of the run.
        site: its name.
        every: use all. Noise hides one example only if no other example's use depends on it, which a sample of fixed
            size out of ``count`` does not guarantee.

    Returns:
        Indices, ascending.
    """
    if every or count <= examples:
        return np.arange(count)
    # The number is part of the seed: a sample of one more is independent, not the same with one more.
    sampled = generator(seed, site, "calibrate", examples).permutation(count)
    return np.sort(sampled[:examples])


def observe_ranges(
    graph: bytes,
    tensors: tuple[str, ...],
    x: NDArray[Any],
    indices: NDArray[Any],
    bound: float,
    terms: Terms,
    *,
    noised: bool = False,
) -> ObservedRanges:
    """Compute the ranges of the activations over examples, in parts of bounded size.

    Args:
        graph: the site's own, in fp32.
        tensors: names of its observed tensors.
        x: ``(n, ...)``, as the network takes them.
        indices: indices of the examples that are used, 1 or more.
        bound: to whose magnitude activations are clipped.
        terms: its deadline is that of all examples together.
        noised: whether the counts leave with noise. An example that is not finite, or whose activations are not, then
            counts as beyond the bound: an error would tell of it, and no noise hides an error. Nor does it hide that
            the graph crashes or takes too long, where one example's values are the cause.

    Raises:
        SiteError: 401, an example is not finite; 413, an activation is not, the graph does not run, or not in time.
    """
    counts = np.zeros((len(tensors), ranges.SIDES, ranges.BINS), np.int64)
    both: list[NDArray[np.float64]] = []
    beyond = False
    try:
        for extremes in _extremes(
            observed(graph, tensors), len(tensors), x, indices, terms, noised
        ):
            clipped, out_of_bound = ranges.clipped(extremes, bound, finite=not noised)
            counts += ranges.histogram(clipped)
            both.append(ranges.merged(list(clipped)))
            beyond |= out_of_bound
    except GraphFailedError as error:
        raise SiteError(_FAILED, f"fp32 graph: {error}") from None
    except ValueError as error:
        raise SiteError(_OUT_OF_RANGE, str(error)) from None
    if beyond:
        log.warning("activations are clipped to %g", bound)
    return ObservedRanges(counts, ranges.merged(both))


def _extremes(
    graph: bytes,
    tensors: int,
    x: NDArray[Any],
    indices: NDArray[Any],
    terms: Terms,
    noised: bool,
) -> Iterator[NDArray[np.float32]]:
    """Minima and maxima ``(m, tensors, 2)`` of one part after the other."""
    until = time.monotonic() + terms.deadline
    widest = max(x[:1].nbytes, 2 * tensors * np.dtype(np.float64).itemsize, 1)
    step = max(1, PART_BYTES // widest)
    for at in range(0, len(indices), step):
        part = x[indices[at : at + step]]
        # A runtime may treat NaN as a number, for example in max(NaN, 0).
        finite = np.isfinite(part).reshape(len(part), -1).all(axis=1)
        if not noised and not finite.all():
            raise SiteError(_OUT_OF_RANGE, "examples: must be finite, got NaN or infinity")
        part[~finite] = 0
        left = until - time.monotonic()
        if left <= 0:
            raise GraphFailedError(f"must be run within {terms.deadline:g} s")
        run = Terms(left, terms.threads)
        extremes = onnx_runs.extremes(graph, part, tensors, run, finite=not noised)
        extremes[~finite] = np.nan
        yield extremes
