"""The admission gate for what sites report about the final model: ranges, and scores of the candidates."""

from __future__ import annotations

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
    records_of,
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
    """What one site reports about the model's activations.

    Attributes:
        num_examples: number of examples that they cover.
        values: smallest and largest value by tensor, of shape (tensors, 2); with noise the counts of all histograms,
            of shape (counts,).
    """

    num_examples: int
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """The scores of the candidates at one site.

    Attributes:
        counters: candidate -> counter -> count.
        absent: candidates that do not count, with the reason.
    """

    counters: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: list[Absent] = field(default_factory=list)


def admit_ranges(
    reply: Message,
    site: str,
    max_examples: int,
    expected: Expected,
    graph: str,
    tensors: int,
    bound: float,
) -> tuple[Ranges | None, Verdict]:
    """Admit or reject one site's ranges.

    Args:
        reply: reply of the site.
        site: name of the site.
        max_examples: maximum number of training examples that the site may report.
        expected: what a reply of this exchange must look like.
        graph: SHA-256 (hex) of the graph that the reply must name.
        tensors: number of tensors of that graph.
        bound: absolute value to which the site clips activations.

    Returns:
        The ranges, None where they are rejected, and the result of the validation.
    """
    try:
        metrics, num_examples = _metrics_of(reply, site, max_examples, expected)
        own = _config(reply).get(protocol.GRAPH)
        if own != graph:
            raise RefusedError(429, f"{protocol.GRAPH}: must be {graph}, got {printable(own)}")
        if expected.noised is not None:
            counts = Ranges(num_examples, _noised(metrics, expected))
            return counts, _ledger_verdict(reply, site, metrics, expected.delta)
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
    max_examples: int,
    expected: Expected,
    digests: Mapping[str, str],
    names: Sequence[str],
) -> tuple[Scores | None, Verdict]:
    """Admit or reject what the candidates scored at one site.

    Args:
        reply: reply of the site.
        site: name of the site.
        max_examples: maximum number of test examples that the site may report.
        expected: what a reply of this exchange must look like.
        digests: candidate -> SHA-256 (hex) of its graph.
        names: names of the counters, ``candidate/counter``, in the order of the reply's list.

    Returns:
        The scores, None where they are rejected, and the result of the validation.
    """
    try:
        metrics, num_examples = _metrics_of(reply, site, max_examples, expected)
        site_digests = _digests(_config(reply), len(digests))
        verdict = Verdict()
        if expected.noised is not None:
            values = _noised(metrics, expected)
            verdict = _ledger_verdict(reply, site, metrics, expected.delta)
        else:
            values = _numbers(metrics, protocol.COUNTS, len(names))
        scores = Scores()
        for (kind, digest), site_digest in zip(digests.items(), site_digests, strict=True):
            counted = {
                name.partition("/")[2]: float(value)
                for name, value in zip(names, values, strict=True)
                if name.startswith(f"{kind}/")
            }
            if absent := _fault(site, kind, digest, site_digest, counted, num_examples, expected):
                scores.absent.append(absent)
            else:
                scores.counters[kind] = counted
        return scores, verdict
    except RefusedError as refused:
        return None, _rejected(site, refused)


def _fault(
    site: str,
    kind: str,
    digest: str,
    site_digest: str,
    counted: Mapping[str, float],
    num_examples: int,
    expected: Expected,
) -> Absent | None:
    """Why a candidate does not count at a site."""
    if site_digest != digest:
        code = 429 if site_digest else 413
        reason = "made other bytes of it" if site_digest else "could not make it"
        return Absent(site, kind, code, reason)
    if expected.noised is not None:
        return None
    if counted[RAN] == 0:
        return Absent(site, kind, 413, "does not run there; the site's log says why")
    for name, value in counted.items():
        minimum, bound = 0.0, float(num_examples)
        if name in (RAN, _EXAMPLES):
            minimum = bound = 1.0 if name == RAN else bound
        elif name == _LOSS:
            bound *= expected.policy.max_loss
        if not minimum <= value <= bound:
            return Absent(site, kind, 405, f"{name}: must be {minimum:g} to {bound:g}")
    return None


def _metrics_of(
    reply: Message, site: str, max_examples: int, expected: Expected
) -> tuple[MetricRecord, int]:
    _, metrics = records_of(reply, site, expected, with_arrays=False)
    return metrics, examples_of(metrics, max_examples if expected.noised is None else 1)


def _config(reply: Message) -> ConfigRecord:
    return reply.content.config_records[protocol.CONFIG]


def _digests(config: ConfigRecord, count: int) -> list[str]:
    digests = config.get(protocol.CANDIDATE_DIGESTS)
    if not isinstance(digests, list) or len(digests) != count:
        raise RefusedError(411, f"{protocol.CANDIDATE_DIGESTS}: must be {count} texts, got others")
    return [value if isinstance(value, str) else "" for value in digests]


def _numbers(metrics: MetricRecord, key: str, count: int) -> NDArray[np.float64]:
    values = metrics.get(key)
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else type(values).__name__
        raise RefusedError(411, f"{key}: must be {count} numbers, got {got}")
    numbers = [number_of(value) for value in values]
    if any(number is None for number in numbers):
        raise RefusedError(401, f"{key}: must be finite numbers, got others")
    return np.array(numbers, np.float64)


def _noised(metrics: MetricRecord, expected: Expected) -> NDArray[np.float64]:
    values = _numbers(metrics, protocol.COUNTS, len(expected.counters))
    minimum, maximum = expected.noised_range
    if values.min(initial=0.0) < minimum or values.max(initial=0.0) > maximum:
        raise RefusedError(
            401, f"{protocol.COUNTS}: must be {minimum:g} to {maximum:g}, got others"
        )
    return values


def _ledger_verdict(reply: Message, site: str, metrics: MetricRecord, delta: float) -> Verdict:
    """What the site reports about its privacy ledger."""
    spent, drops = epsilon_of(metrics, site, delta)
    evaluation = Evaluation(site, {}, spent, ledger_of(reply.content))
    return Verdict(evaluation=evaluation, drops=drops)


def _rejected(site: str, refused: RefusedError) -> Verdict:
    return Verdict(rejection=Rejection(site, refused.code, refused.outcome, refused.reason))
