"""What a masked vector is made of: the same on both sides, from the task's network and the run's settings alone.

``[weight * update | weight * state | exact counters]``: the update of the parameters, clipped as a whole; then what is
no parameter but travels with them (BatchNorm's statistics, SCAFFOLD's variates), bounded value by value; then the
weight itself, the loss and all that a plain reply would say in clear. Integer buffers are not aggregated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared import protocol
from fedge.shared.privacy.mechanisms import distributed
from fedge.shared.secagg.exact_counters import Counter
from fedge.shared.secagg.fixed_point import Segment
from fedge.shared.secagg.masking import Shape
from fedge.shared.wire.tensors import NDArrays

#: Losses and task counters are added in steps of 2^-20; sums over standardised columns in steps of 2^-36.
_FRACTION, _FINE = 20, 36
_MAX_COUNTER: Final = 2**39

# Counters of a training sum.
SITES: Final = "sites"
EXAMPLES: Final = "examples"
LOSS: Final = "loss"
SATURATED: Final = "saturated"
CLIPPED: Final = "clipped"
CAPPED: Final = "capped"


@dataclass(frozen=True)
class Bounds:
    """What the server asks for, and the site's policy bounds.

    Attributes:
        clipping_bound: L2 norm of the parameters' update; a longer one is scaled down.
        value_bound: largest change of one parameter; a larger one saturates. The smaller, the finer the steps.
        state_bound: largest change of a value that is no parameter; a larger one saturates.
        weight_cap: examples beyond which a site weighs no more.
    """

    clipping_bound: float
    value_bound: float
    state_bound: float
    weight_cap: int


@dataclass(frozen=True)
class Placed:
    """A tensor's place: ``size`` values from ``start``."""

    name: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Layout:
    """The parts of a masked vector.

    Attributes:
        tensors: floating-point tensors, parameters first.
        segments: of their values, each with its bound.
        counters: exact ones, after the values.
    """

    tensors: tuple[Placed, ...]
    segments: tuple[Segment, ...]
    counters: tuple[Counter, ...]

    @property
    def values(self) -> int:
        """Coordinates of the tensors."""
        return sum(segment.size for segment in self.segments)

    @property
    def shape(self) -> Shape:
        """Elements of each ring."""
        return Shape(self.values, len(self.counters))

    def flatten(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Tensors as one vector of ``values`` coordinates, in the widest of their types."""
        dtype = np.result_type(np.float32, *(arrays[t.name].dtype for t in self.tensors))
        flat = np.empty(self.values, dtype)
        for t in self.tensors:
            flat[t.start : t.start + t.size] = arrays[t.name].reshape(-1)
        return flat

    def unflatten(self, flat: NDArray[Any]) -> NDArrays:
        """The reverse of ``flatten``."""
        return {t.name: flat[t.start : t.start + t.size].reshape(t.shape) for t in self.tensors}


def of_training(
    shapes: Mapping[str, tuple[int, ...]],
    parameters: Iterable[str],
    bounds: Bounds,
    *,
    control: bool,
) -> Layout:
    """The vector of a training round.

    Args:
        shapes: of the network's floating-point tensors, in its order.
        parameters: names of those that are trained.
        bounds: of the run.
        control: SCAFFOLD's changes of the control variates follow, one a tensor.
    """
    trained = set(parameters)
    first = [name for name in shapes if name in trained]
    others = [(name, shapes[name]) for name in shapes if name not in trained]
    if control:
        others += [(protocol.CONTROL_PREFIX + name, shape) for name, shape in shapes.items()]
    tensors = _place([*((name, shapes[name]) for name in first), *others])
    update = sum(t.size for t in tensors[: len(first)])
    rest = sum(t.size for t in tensors[len(first) :])
    segments = [Segment("update", update, bounds.value_bound)]
    if rest:
        segments.append(Segment("state", rest, bounds.state_bound))
    counters = (
        Counter(SITES, 0, 1),
        Counter(EXAMPLES, 0, bounds.weight_cap),
        Counter(LOSS, 0, _MAX_COUNTER, _FRACTION),
        Counter(SATURATED, 0, _MAX_COUNTER),
        Counter(CLIPPED, 0, 1),
        Counter(CAPPED, 0, 1),
    )
    return Layout(tensors, tuple(segments), counters)


def of_noised(
    shapes: Mapping[str, tuple[int, ...]], parameters: Iterable[str], clipping_bound: float
) -> Layout:
    """The vector of a training round with distributed noise: the update on that noise's grid, and how many sites.

    Args:
        shapes: of the network's floating-point tensors, in its order.
        parameters: names of those that are trained.
        clipping_bound: L2 norm of an update.

    Raises:
        ValueError: the network has floating-point values besides its parameters, which no noise covers.
    """
    trained = set(parameters)
    if others := [name for name in shapes if name not in trained]:
        raise ValueError(
            f"network: must have no state besides its parameters, got {others[0][:80]}"
        )
    tensors = _place(shapes.items())
    size = sum(t.size for t in tensors)
    grid = distributed.steps_a_unit(clipping_bound)
    segment = Segment("update", size, clipping_bound, grid)
    return Layout(tensors, (segment,), (Counter(SITES, 0, 1),))


def of_evaluation(counters: Sequence[str], *, noised: bool = False) -> Layout:
    """The vector of an evaluation: the task's counters.

    Args:
        counters: their names.
        noised: they have noise, which may carry them below 0. Its grid is this one's, or a coarser one.
    """
    low = -_MAX_COUNTER if noised else 0
    own = (Counter(_own(name), low, _MAX_COUNTER, _FRACTION) for name in counters)
    return Layout((), (), (Counter(SITES, 0, 1), *own))


def of_statistics(columns: int) -> Layout:
    """The vector of the sums over standardised columns, each in units of its column's bound."""
    most = 2**23
    kinds = (protocol.FEATURE_TOTAL, protocol.FEATURE_TOTAL_OF_SQUARES)
    return Layout(
        (),
        (),
        (
            Counter(SITES, 0, 1),
            Counter(EXAMPLES, 0, most),
            *(
                Counter(f"{kind}-{column}", -most, most, _FINE)
                for kind in kinds
                for column in range(columns)
            ),
        ),
    )


def task_counters(found: Mapping[str, float]) -> dict[str, float]:
    """A task's counters under their names in the layout, which has one of its own called ``sites``."""
    return {_own(name): value for name, value in found.items()}


def from_task_counters(found: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The reverse of ``task_counters``."""
    return {name: found[_own(name)] for name in names}


def _own(name: str) -> str:
    return f"task/{name}"


def _place(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[Placed, ...]:
    found: list[Placed] = []
    start = 0
    for name, shape in tensors:
        size = int(np.prod(shape, dtype=np.int64))
        found.append(Placed(name, shape, start, size))
        start += size
    return tuple(found)
