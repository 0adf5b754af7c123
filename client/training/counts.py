"""What a site is asked to count over its examples, whatever becomes of it: told, masked, or noised and charged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from fedge.shared import protocol

Reported: TypeAlias = dict[str, int | float | list[int] | list[float]]


@dataclass(frozen=True)
class RequestedCounts:
    """The figures of one request.

    Attributes:
        kind: its message type.
        names: counters that leave under masks.
        told: metrics that leave in clear and without noise.
        count: the counters by name, all 0 where the site has no examples; and ``examples``, by which shares are made.
        num_examples: that are looked at.
        noised: counters that leave with noise; ``names`` unless given.
        sensitivity: see ``noised_counts.of``.
        listed: noised counters travel as one list, in the order of their names here.
        config: beside the reply's own.
    """

    kind: str
    names: tuple[str, ...]
    told: Callable[[], Reported]
    count: Callable[[], Mapping[str, float]]
    num_examples: int
    noised: tuple[str, ...] | None = None
    sensitivity: float | None = None
    listed: bool = False
    config: Callable[[], Mapping[str, str | list[str]]] = field(default=dict)


def of_evaluation(
    names: tuple[str, ...], num_examples: int, count: Callable[[], Mapping[str, float]]
) -> RequestedCounts:
    """The task's counters over held-out examples."""

    def told() -> Reported:
        found = count()
        return {protocol.NUM_EXAMPLES: num_examples, **{name: found[name] for name in names}}

    return RequestedCounts(protocol.EVALUATE, names, told, count, num_examples)
