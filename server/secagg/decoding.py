"""What an unmasked sum says: its exact counters, and the weights that are the mean over its sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedge.server.aggregation.updates import Summed
from fedge.server.secagg.outcome import SAMPLE, UnmaskedSum
from fedge.shared.config.sections import AdmissionSection
from fedge.shared.errors import RunError
from fedge.shared.secagg import exact_counters, fixed_point, masking, parallel, vector_layout
from fedge.shared.secagg.vector_layout import Bounds, Layout, Placed
from fedge.shared.wire.tensors import NDArrays

_FAILED, _OUT_OF_RANGE = 510, 511
#: Beyond what an honest sum may reach, by rounding alone.
_SLACK: Final = 1.001
#: Values at a time: decoded, measured and added while they are in a core's cache.
_CHUNK: Final = 2**16
_DOT: Final = 2**13


def counted(layout: Layout, unmasked: UnmaskedSum) -> dict[str, float]:
    """The exact counters of a sum.

    Raises:
        RunError: 511, they are not a sum of what these sites may send.
    """
    sites = len(unmasked.sites)
    try:
        found = exact_counters.decode_counters(
            masking.counters_in(unmasked.total, len(layout.counters)), layout.counters, sites
        )
    except ValueError:
        raise _out_of_range("counters") from None
    if found[vector_layout.SITES] != sites:
        raise _out_of_range("counters")
    return dict(found)


def mean_weights(
    layout: Layout,
    unmasked: UnmaskedSum,
    bounds: Bounds,
    current: NDArrays,
    policy: AdmissionSection,
) -> tuple[Summed, Mapping[str, float]]:
    """A sum of weighted updates as the weighted mean of the sites' weights.

    Args:
        layout: of a training sum.
        unmasked: the sum. Its memory becomes the mean's: it can be read once.
        bounds: that the sites kept.
        current: the round's weights. What is not aggregated stays as it is here.
        policy: of the gate, which sees no single update: its bounds are held against the mean.

    Returns:
        The mean, each tensor in the type that it has in ``current``, and the sum's counters.

    Raises:
        RunError: 511, it is not a sum of what sites may send; 510, of no examples.
    """
    counters = counted(layout, unmasked)
    examples, sites = int(counters[vector_layout.EXAMPLES]), len(unmasked.sites)
    if examples < 1:
        raise RunError(_FAILED, "examples: must be at least 1 over all sites, got none")
    if examples > sites * bounds.weight_cap:
        raise _out_of_range("examples")
    weight = examples / bounds.weight_cap
    mean, norm = _moved(layout, unmasked, weight, current)
    steps = sites / fixed_point.scale(layout.segments[0].bound, unmasked.sharers)
    if not norm <= bounds.clipping_bound * _SLACK + steps / weight * layout.segments[0].size ** 0.5:
        raise _out_of_range("update")
    if not norm <= policy.max_update_norm:
        raise _beyond("update", norm, "admission.max-update-norm", policy.max_update_norm)
    loss = counters[vector_layout.LOSS] / examples
    if not 0 <= loss <= policy.max_loss:
        raise _beyond("loss", loss, "admission.max-loss", policy.max_loss)
    # In the order of the round's weights, what came in addition after them.
    ordered = {name: mean.pop(name, a) for name, a in current.items()} | mean
    return Summed(unmasked.sites, ordered, examples, counters[vector_layout.LOSS]), counters


def noised_mean(layout: Layout, unmasked: UnmaskedSum, current: NDArrays) -> Summed:
    """The mean of a sum with distributed noise, over sites that weigh the same.

    Nothing is held against a bound: the noise is part of the mean, and only the sites know what is under it.

    Raises:
        RunError: 511, the number of sites is not that of the vectors.
    """
    counted(layout, unmasked)
    sites = len(unmasked.sites)
    mean, _ = _moved(layout, unmasked, sites, current)
    ordered = {name: mean.pop(name, a) for name, a in current.items()}
    return Summed(unmasked.sites, ordered, sites, None)


def sample(layout: Layout, unmasked: Summed, current: NDArrays) -> list[float]:
    """The first values of the mean update."""
    found: list[float] = []
    for tensor in layout.tensors[: _updated(layout)]:
        if len(found) >= SAMPLE:
            break
        pair = (unmasked.mean[tensor.name], current[tensor.name])
        new, old = (a.reshape(-1)[: SAMPLE - len(found)].astype(np.float64) for a in pair)
        found += (new - old).tolist()
    return found


def _moved(
    layout: Layout, unmasked: UnmaskedSum, weight: float, current: NDArrays
) -> tuple[NDArrays, float]:
    """Each tensor moved by its mean change, and the L2 norm of the parameters' change.

    One pass over memory, and in the sum's own where a value is as wide: the first touch of new memory takes longer
    than all the rest.
    """
    found = {t.name: _room(t, unmasked.total, current) for t in layout.tensors}
    flat = [found[t.name].reshape(-1) for t in layout.tensors]
    # SCAFFOLD's changes are no difference to anything.
    old = [np.ravel(current[t.name]) if t.name in current else None for t in layout.tensors]
    segments = _segments(layout)
    squares, updated = 0.0, _updated(layout)
    for i, t in enumerate(layout.tensors):
        # What is neither is decoded in float64, and rounded once.
        dtype = np.dtype(np.float32 if flat[i].dtype == np.float32 else np.float64)
        kept = old[i]
        for at in range(0, t.size, _CHUNK):
            into, start = flat[i][at : at + _CHUNK], t.start + at
            change = parallel.scratch(into.size * dtype.itemsize).view(dtype)
            fixed_point.decode(
                unmasked.total[start : start + into.size],
                [replace(segments[i], name=t.name, size=into.size)],
                unmasked.sharers,
                weight,
                out=change,
            )
            if i < updated:
                squares += _squares(change)
            if kept is not None:
                change += kept[at : at + into.size]
            into[...] = change
    return found, squares**0.5


def _squares(values: NDArray[Any]) -> float:
    """Their sum, by BLAS; in pieces so small that it starts no threads of its own for them."""
    parts = (values[at : at + _DOT] for at in range(0, values.size, _DOT))
    return sum(float(part @ part) for part in parts)


def _room(tensor: Placed, total: NDArray[np.uint32], current: NDArrays) -> NDArray[Any]:
    a = current.get(tensor.name)
    if a is not None and a.dtype == np.float32:
        return (
            total[tensor.start : tensor.start + tensor.size].view(np.float32).reshape(tensor.shape)
        )
    return np.empty(tensor.shape, np.float64 if a is None else a.dtype)


def _updated(layout: Layout) -> int:
    """How many tensors are parameters: they come first, in one segment."""
    return sum(t.start < layout.segments[0].size for t in layout.tensors)


def _segments(layout: Layout) -> list[fixed_point.Segment]:
    """The segment of each tensor."""
    ends = np.cumsum([segment.size for segment in layout.segments])
    found = np.searchsorted(ends, [t.start for t in layout.tensors], "right")
    # An empty tensor may start where the last segment ends.
    return [layout.segments[min(int(i), len(layout.segments) - 1)] for i in found]


def _out_of_range(quantity: str) -> RunError:
    return RunError(
        _OUT_OF_RANGE,
        f"secure sum: {quantity} must be in the range that its sites have, got another",
    )


def _beyond(quantity: str, value: float, key: str, bound: float) -> RunError:
    return RunError(
        _OUT_OF_RANGE,
        f"secure sum: mean {quantity} must be at most {key}, {bound:g}, got {value:.4g}",
    )
