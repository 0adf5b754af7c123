"""Counts over a site's examples that a request asks for: reported in clear, under secure aggregation, or with noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from fedge.shared import protocol

Reported: TypeAlias = dict[str, int | float | list[int] | list[float]]


@dataclass(frozen=True)
class RequestedCounts:
    """The counts of one request.

    Attributes:
        kind: its message type.
        names: counters that leave under secure aggregation.
        reported: computes the metrics that leave in clear and without noise.
        count: computes the counters by name, all 0 where the site has no examples; ``examples`` is the denominator.
        num_examples: number of examples that are counted over.
        noised: counters that leave with noise; ``names`` unless given.
        sensitivity: see ``noised_counts.of``.
        listed: whether noised counters are sent as one list, in the order of ``noised``.
        config: computes further values of the reply's configuration record.
    """

    kind: str
    names: tuple[str, ...]
    reported: Callable[[], Reported]
    count: Callable[[], Mapping[str, float]]
    num_examples: int
    noised: tuple[str, ...] | None = None
    sensitivity: float | None = None
    listed: bool = False
    config: Callable[[], Mapping[str, str | list[str]]] = field(default=dict)


def evaluation_counts(
    names: tuple[str, ...], num_examples: int, count: Callable[[], Mapping[str, float]]
) -> RequestedCounts:
    """The task's counters over held-out examples, for an evaluation.

    Args:
        names: of the counters.
        num_examples: number of held-out examples.
        count: computes the counters by name.
    """

    def reported() -> Reported:
        found = count()
        return {protocol.NUM_EXAMPLES: num_examples, **{name: found[name] for name in names}}

    return RequestedCounts(protocol.EVALUATE, names, reported, count, num_examples)
