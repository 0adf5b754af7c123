"""The definition of a task: everything that sites, server and device must agree on, declared in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray
from torch import Tensor, nn

from fedge.shared.preprocessing.schema import InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Step

Counters: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """A ratio of two counters, so that it can be pooled over sites exactly, also under secure aggregation.

    Attributes:
        name: of the metric.
        numerator, denominator: names of the counters.
        higher_is_better: whether a larger value is the better one.
        share: whether it lies within 0 and 1, as accuracy does, so that a difference is in points.
    """

    name: str
    numerator: str
    denominator: str
    higher_is_better: bool = True
    share: bool = True

    def value(self, counters: Mapping[str, float]) -> float | None:
        """The ratio, or None where the denominator is zero."""
        denominator = counters[self.denominator]
        return counters[self.numerator] / denominator if denominator else None


@dataclass(frozen=True)
class Table:
    """Raw examples, before preprocessing.

    Attributes:
        features: ``(n, *input.shape)``, float32.
        labels: ``(n,)``, int64, indices into ``output.labels``.
        sites: ``(n,)`` of str, the natural site of each row (a hospital), or None.
        test: ``(n,)`` of bool, rows that the data's own protocol holds out, or None.
    """

    features: NDArray[Any]
    labels: NDArray[Any]
    sites: NDArray[Any] | None = None
    test: NDArray[Any] | None = None


@dataclass(frozen=True)
class Task:
    """A learning task.

    Attributes:
        name: as in ``task.name``.
        summary: one line of text.
        input, output: the raw example's schema and the meaning of the logits.
        preprocessing: steps from the raw example to the network's input.
        network: builds it with torch's global generator (callers seed it); ``(b, *in)`` to ``(b, logits)``.
        loss: mean over the batch of (logits ``(b, k)``, labels ``(b,)`` int64).
        counters: sums over the batch; always holds ``examples`` and ``loss-sum``; every other counter
            lies between 0 and ``examples``.
        metrics: that are reported, each a ratio of counters.
        load: reads the examples; takes ``data.path`` (None where the task needs no file) and raises DataError.
    """

    name: str
    summary: str
    input: InputSchema
    output: OutputSchema
    preprocessing: tuple[Step, ...]
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    counters: Callable[[Tensor, Tensor], Counters]
    metrics: tuple[Metric, ...]
    load: Callable[[Path | None], Table]

    def values(self, counters: Mapping[str, float]) -> dict[str, float]:
        """All metrics whose denominator is not zero."""
        values = ((metric.name, metric.value(counters)) for metric in self.metrics)
        return {name: value for name, value in values if value is not None}

    @property
    def counter_names(self) -> tuple[str, ...]:
        """Every counter that the metrics use, sorted."""
        return tuple(sorted({name for m in self.metrics for name in (m.numerator, m.denominator)}))
