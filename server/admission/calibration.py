"""The admission gate of what sites say about the final model: ranges, and what graphs score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord
from numpy.typing import NDArray

from fedge.server.admission.reply_fields import (
    RefusedError,
    epsilon_of,
    examples_of,
    ledger_of,
    number_of,
    opened,
)
from fedge.server.admission.validation_result import (
    Evaluation,
    Expected,
    Rejection,
    Verdict,
    printable,
)
from fedge.shared import protocol
from fedge.shared.compile.calibration import Absent

#: Counter of a candidate: 1 where it ran.
RAN = "ran"
_EXAMPLES, _LOSS = "examples", "loss-sum"


@dataclass(frozen=True)
class Ranges:
    """What one site says of its activations.

    Attributes:
        num_examples: that it looked at.
        values: ``(tensors, 2)``, smallest and largest; with noise the counts of all histograms.
    """

    num_examples: int
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What the candidates scored at one site: counters by candidate, and which do not count, with the reason."""

    counters: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: list[Absent] = field(default_factory=list)


def admit_ranges(
    reply: Message, site: str, most: int, expected: Expected, graph: str, tensors: int, bound: float
) -> tuple[Ranges | None, Verdict]:
    """Admit or reject one site's ranges.

    Args:
        reply: of the site.
        site: its name.
        most: training examples that it may have looked at.
        expected: of this exchange.
        graph: SHA-256 (hex) of the graph that it must speak of.
        tensors: of that graph.
        bound: to which it clips.
    """
    try:
        metrics, num_examples = _opened(reply, site, most, expected)
        own = _config(reply).get(protocol.GRAPH)
        if own != graph:
            raise RefusedError(429, f"{protocol.GRAPH}: must be {graph}, got {printable(own)}")
        if expected.noised is not None:
            found = Ranges(num_examples, _noised(metrics, num_examples, expected))
            return found, _vouched(reply, site, metrics)
        both = np.stack(
            [_numbers(metrics, k, tensors) for k in (protocol.RANGE_LOW, protocol.RANGE_HIGH)],
            axis=1,
        )
        if (both[:, 0] > both[:, 1]).any() or (np.abs(both) > bound).any():
            raise RefusedError(401, f"ranges: must go upwards and be within {bound:g}, got others")
        return Ranges(num_examples, both), Verdict()
    except RefusedError as refused:
        return None, _rejected(site, refused)


def admit_scores(
    reply: Message,
    site: str,
    most: int,
    expected: Expected,
    digests: Mapping[str, str],
    names: Sequence[str],
) -> tuple[Scores | None, Verdict]:
    """Admit or reject what the candidates scored at one site.

    Args:
        reply: of the site.
        site: its name.
        most: test examples that it may have counted.
        expected: of this exchange.
        digests: SHA-256 (hex) of each candidate.
        names: of the counters, ``candidate/counter``, in the order of the reply's list.
    """
    try:
        metrics, num_examples = _opened(reply, site, most, expected)
        own = _digests(_config(reply), len(digests))
        verdict = Verdict()
        if expected.noised is not None:
            values = _noised(metrics, num_examples, expected)
            verdict = _vouched(reply, site, metrics)
        else:
            values = _numbers(metrics, protocol.COUNTS, len(names))
        found = Scores()
        for (kind, digest), made in zip(digests.items(), own, strict=True):
            counted = {
                name.partition("/")[2]: float(value)
                for name, value in zip(names, values, strict=True)
                if name.startswith(f"{kind}/")
            }
            if absent := _fault(site, kind, digest, made, counted, num_examples, expected):
                found.absent.append(absent)
            else:
                found.counters[kind] = counted
        return found, verdict
    except RefusedError as refused:
        return None, _rejected(site, refused)


def _fault(
    site: str,
    kind: str,
    digest: str,
    made: str,
    counted: Mapping[str, float],
    num_examples: int,
    expected: Expected,
) -> Absent | None:
    """Why a candidate does not count at a site."""
    if made != digest:
        code = 429 if made else 413
        return Absent(site, kind, code, "made other bytes of it" if made else "could not make it")
    if expected.noised is not None:
        return None
    if counted[RAN] == 0:
        return Absent(site, kind, 413, "does not run there; the site's log says why")
    for name, value in counted.items():
        least, bound = 0.0, float(num_examples)
        if name in (RAN, _EXAMPLES):
            least = bound = 1.0 if name == RAN else bound
        elif name == _LOSS:
            bound *= expected.policy.max_loss
        if not least <= value <= bound:
            return Absent(site, kind, 405, f"{name}: must be {least:g} to {bound:g}")
    return None


def _opened(reply: Message, site: str, most: int, expected: Expected) -> tuple[MetricRecord, int]:
    _, metrics = opened(reply, site, expected, with_arrays=False)
    whole = expected.noised is not None and expected.noised.unit == "site"
    return metrics, examples_of(metrics, 1 if whole else most)


def _config(reply: Message) -> ConfigRecord:
    return reply.content.config_records[protocol.CONFIG]


def _digests(config: ConfigRecord, count: int) -> list[str]:
    found = config.get(protocol.CANDIDATE_DIGESTS)
    if not isinstance(found, list) or len(found) != count:
        raise RefusedError(411, f"{protocol.CANDIDATE_DIGESTS}: must be {count} texts, got others")
    return [value if isinstance(value, str) else "" for value in found]


def _numbers(metrics: MetricRecord, key: str, count: int) -> NDArray[np.float64]:
    values = metrics.get(key)
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else type(values).__name__
        raise RefusedError(411, f"{key}: must be {count} numbers, got {got}")
    numbers = [number_of(value) for value in values]
    if any(number is None for number in numbers):
        raise RefusedError(401, f"{key}: must be finite numbers, got others")
    return np.array(numbers, np.float64)


def _noised(metrics: MetricRecord, num_examples: int, expected: Expected) -> NDArray[np.float64]:
    of = expected.noised
    reach = math.inf if of is None else of.reach
    values = _numbers(metrics, protocol.COUNTS, len(expected.counters))
    if values.min(initial=0.0) < -reach or values.max(initial=0.0) > num_examples + reach:
        most = num_examples + reach
        raise RefusedError(401, f"{protocol.COUNTS}: must be {-reach:g} to {most:g}, got others")
    return values


def _vouched(reply: Message, site: str, metrics: MetricRecord) -> Verdict:
    """What the site says of its ledger."""
    spent, drops = epsilon_of(metrics, site)
    told = Evaluation(site, {}, spent, ledger_of(reply.content))
    return Verdict(evaluation=told, drops=drops)


def _rejected(site: str, refused: RefusedError) -> Verdict:
    return Verdict(rejection=Rejection(site, refused.code, refused.outcome, refused.reason))
