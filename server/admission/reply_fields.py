"""The fields of a reply, each validated where it is read.

A reply is untrusted input: its names, types, shapes, sizes and numbers are checked, and its text is repeated only in
part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedge.server.admission.validation_result import (
    Drop,
    Expected,
    Outcome,
    printable,
    reported_words,
)
from fedge.shared import protocol
from fedge.shared.preprocessing.steps import Statistics
from fedge.shared.tasks.standardised_columns import Bound
from fedge.shared.wire.npy import UndecodableError, decode
from fedge.shared.wire.tensors import NDArrays

#: More values than any task reports; and the maximum change of an integer tensor's value in a round.
_MAX_METRICS, _COUNTER_STEP = 64, 1e9
_MAX_EPSILON = 1e9
_SPENT = (protocol.EPSILON_CONSUMERS, protocol.EPSILON_SERVER, protocol.EPSILON_DELTA)
_PRIVATE = (protocol.NUM_EXAMPLES, *_SPENT)


class RefusedError(Exception):
    """A reply is not admitted.

    Args:
        code: FE number.
        reason: in words.
        outcome: kind of the rejection.
    """

    def __init__(self, code: int, reason: str, outcome: Outcome = "rejected") -> None:
        super().__init__(reason)
        self.code, self.reason, self.outcome = code, reason, outcome


def content_of(reply: Message, records: set[str]) -> RecordDict:
    """The content of a reply, which must hold exactly these records.

    Args:
        reply: reply of a node.
        records: names of the records.

    Raises:
        RefusedError: 410, the site reports an error; 411, other records.
    """
    if reply.has_error():
        raise RefusedError(410, reported_words(reply.error), "error")
    if not reply.has_content():
        raise RefusedError(411, "the reply is empty")
    names = set(reply.content.keys())
    if names != records:
        raise RefusedError(
            411, f"records: must be {sorted(records)}, got {printable(sorted(names))}"
        )
    return reply.content


def config_of(content: RecordDict) -> ConfigRecord:
    """The ``config`` record of a reply, which names the request that it answers.

    Raises:
        RefusedError: 411, the record is of another kind.
    """
    config = content[protocol.CONFIG]
    if not isinstance(config, ConfigRecord):
        raise RefusedError(
            411, f"{protocol.CONFIG}: must be a ConfigRecord, got {type(config).__name__}"
        )
    return config


def metrics_of(content: RecordDict) -> MetricRecord:
    """The ``metrics`` record of a reply.

    Raises:
        RefusedError: 411, the record is of another kind, or holds too many values.
    """
    metrics = content[protocol.METRICS]
    if not isinstance(metrics, MetricRecord):
        raise RefusedError(
            411, f"{protocol.METRICS}: must be a MetricRecord, got {type(metrics).__name__}"
        )
    if len(metrics) > _MAX_METRICS:
        # Each unknown metric is reported by name; without a bound a site could fill the journal.
        raise RefusedError(
            411, f"{protocol.METRICS}: must hold at most {_MAX_METRICS} values, got {len(metrics)}"
        )
    return metrics


def must_answer(config: ConfigRecord, run_id: str, server_round: int) -> None:
    """Check that a reply answers this round's request.

    Args:
        config: record of the reply.
        run_id: fedge's id of the run.
        server_round: number of the round.

    Raises:
        RefusedError: 406, it answers another.
    """
    answered = (config.get(protocol.RUN_ID), config.get(protocol.SERVER_ROUND))
    if answered != (run_id, server_round) or type(answered[1]) is not int:
        shown = f"run {printable(answered[0])}, round {printable(answered[1])}"
        raise RefusedError(
            406, f"must answer run {run_id}, round {server_round}, got {shown}", "stale"
        )


def records_of(
    reply: Message, site: str, expected: Expected, *, with_arrays: bool
) -> tuple[ArrayRecord, MetricRecord]:
    """The arrays and metrics of a reply that answers the request.

    Args:
        reply: reply of a node.
        site: name of the site that must have sent it.
        expected: what a reply of this round must look like.
        with_arrays: the reply must hold arrays; else it must hold none, and an empty record is returned.

    Raises:
        RefusedError: 406, 410 or 411, it does not answer the request.
    """
    records = {protocol.CONFIG, protocol.METRICS} | ({protocol.ARRAYS} if with_arrays else set())
    content = content_of(reply, records)
    config = config_of(content)
    must_answer(config, expected.run_id, expected.server_round)
    if config.get(protocol.SITE) != site:
        raise RefusedError(411, f"site: must be {site}, got {printable(config.get(protocol.SITE))}")
    arrays = content[protocol.ARRAYS] if with_arrays else ArrayRecord()
    if not isinstance(arrays, ArrayRecord):
        raise RefusedError(
            411, f"{protocol.ARRAYS}: must be an ArrayRecord, got {type(arrays).__name__}"
        )
    return arrays, metrics_of(content)


def examples_of(metrics: MetricRecord, registered_examples: int) -> int:
    """The number of examples that a reply is based on.

    Args:
        metrics: record of the reply.
        registered_examples: maximum: the number of examples that the site registered.

    Raises:
        RefusedError: 403, there are none, or more than the site registered.
    """
    value = metrics.get(protocol.NUM_EXAMPLES)
    if type(value) is not int or not 1 <= value <= registered_examples:
        raise RefusedError(
            403,
            f"{protocol.NUM_EXAMPLES}: must be 1 to {registered_examples} as registered,"
            f" got {printable(value)}",
        )
    return value


def number_of(value: object) -> float | None:
    """A finite number; None for anything else."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def ledger_of(content: RecordDict) -> str | None:
    """The digest of a site's privacy ledger, where a reply holds one."""
    config = content.get(protocol.CONFIG)
    value = config.get(protocol.PRIVACY_LEDGER) if isinstance(config, ConfigRecord) else None
    return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else None


def epsilon_of(
    metrics: MetricRecord, site: str, at: float
) -> tuple[tuple[float, float, float] | None, list[Drop]]:
    """The epsilon that a site reports to have spent.

    Args:
        metrics: record of the reply.
        site: name of the site.
        at: delta at which it must be.

    Returns:
        Epsilon against the model consumers and against the server (infinite where the server gets updates without
        noise), and at which delta; None where a value is not possible; and the values that were left out. The update
        counts anyway.
    """
    consumers, server, delta = (number_of(metrics.get(key)) for key in _SPENT)
    if metrics.get(protocol.EPSILON_SERVER) == math.inf:
        # The server gets updates without noise.
        server = math.inf
    if consumers is not None and server is not None and delta is not None:
        bounded = 0 <= server <= _MAX_EPSILON or server == math.inf
        if 0 <= consumers <= _MAX_EPSILON and bounded and delta == at:
            return (consumers, server, delta), []
    reason = f"must be 0 to {_MAX_EPSILON:g}, at delta {at:g}"
    return None, [Drop(site, key, reason) for key in _SPENT]


def loss_of(
    metrics: MetricRecord, site: str, expected: Expected
) -> tuple[float | None, list[Drop]]:
    """The training loss, None where the site reports no valid one, and what was left out of the metrics.

    Args:
        metrics: record of the reply.
        site: name of the site.
        expected: what a reply of this round must look like.

    Raises:
        RefusedError: 401, the loss is not valid and the strategy weighs by it.
    """
    known = _PRIVATE if expected.private else (protocol.NUM_EXAMPLES, protocol.TRAIN_LOSS)
    drops = [
        Drop(site, printable(key), "not a metric of this task")
        for key in metrics
        if key not in known
    ]
    if expected.private:
        return None, drops
    raw = metrics.get(protocol.TRAIN_LOSS)
    loss, bound = number_of(raw), expected.policy.max_loss
    if loss is not None and 0 <= loss <= bound:
        return loss, drops
    reason = f"must be 0 to {bound:g}, got {printable(raw)}"
    if expected.needs_loss:
        raise RefusedError(401, f"{protocol.TRAIN_LOSS}, by which the strategy weighs: {reason}")
    return None, [*drops, Drop(site, protocol.TRAIN_LOSS, reason)]


def counters_of(
    metrics: MetricRecord, site: str, num_examples: int, expected: Expected
) -> tuple[dict[str, float], list[Drop]]:
    """The task's counters that lie within their ranges, and what was left out.

    Args:
        metrics: record of the reply.
        site: name of the site.
        num_examples: number of examples that the counters are over.
        expected: what a reply of this round must look like.
    """
    counters: dict[str, float] = {}
    drops: list[Drop] = []
    for key, raw in metrics.items():
        if key == protocol.NUM_EXAMPLES or (expected.noised is not None and key in _SPENT):
            continue
        if key not in expected.counters:
            drops.append(Drop(site, printable(key), "not a metric of this task"))
            continue
        value = number_of(raw)
        bound = num_examples * (expected.policy.max_loss if key == "loss-sum" else 1.0)
        minimum = num_examples if key == "examples" else 0.0
        if expected.noised is not None and key in expected.noised.noised:
            # Noise may move a counter beyond its range; the metrics are clipped to theirs.
            minimum, bound = expected.noised_range
        if value is None or not minimum <= value <= bound:
            drops.append(Drop(site, key, f"must be {minimum:g} to {bound:g}, got {printable(raw)}"))
        else:
            counters[key] = value
    missing = [key for key in expected.counters if key not in metrics]
    drops += [Drop(site, key, "missing") for key in missing]
    return counters, drops


def arrays_of(arrays: ArrayRecord, expected: Expected) -> NDArrays:
    """Decode a reply's tensors, which must have the reference's names, shapes and dtypes.

    Args:
        arrays: record of the reply.
        expected: what a reply of this round must look like, with the reference and the bounds of the L2 norms.

    Returns:
        Tensor name -> array, in the reference's order.

    Raises:
        RefusedError: 401, NaN or infinity; 402, the update or a counter moved too far; 404, other tensors.
    """
    names, wanted = set(arrays.keys()), set(expected.reference)
    if names != wanted:
        missing, extra = sorted(wanted - names), sorted(names - wanted)
        raise RefusedError(
            404, f"tensors: missing {printable(missing)}, unknown {printable(extra)}"
        )
    decoded: NDArrays = {}
    squares = {"update": 0.0, "control": 0.0}
    for name, reference in expected.reference.items():
        try:
            value = decode(arrays[name], reference.shape, reference.dtype)
        except UndecodableError as error:
            raise RefusedError(404, f"{name}: {printable(str(error), 160)}") from None
        decoded[name] = value
        if value.dtype.kind in "iu":
            # Counters, such as of batches: they may change by much, but not so much that a mean overflows.
            if (
                np.abs(value.astype(np.float64) - reference.astype(np.float64)).max(initial=0)
                > _COUNTER_STEP
            ):
                raise RefusedError(402, f"{name}: must step by at most {_COUNTER_STEP:g}, got more")
            continue
        if value.dtype.kind not in "fc":
            continue
        if not np.isfinite(value).all():
            raise RefusedError(401, f"{name}: must be finite, got NaN or infinity")
        control = name.startswith(protocol.CONTROL_PREFIX)
        difference = value.astype(np.float64) - (0.0 if control else reference.astype(np.float64))
        squares["control" if control else "update"] += float(np.vdot(difference, difference).real)
    policy = expected.policy
    max_norm = policy.max_update_norm + expected.noise_norm
    for kind, bound in (("update", max_norm), ("control", policy.max_control_norm)):
        norm = math.sqrt(squares[kind])
        if not norm <= bound:
            raise RefusedError(402, f"{kind} norm: must be at most {bound:g}, got {norm:.4g}")
    return decoded


def statistics_of(
    metrics: Mapping[str, Any], count: int, bounds: tuple[Bound, ...]
) -> Statistics | None:
    """The sums and sums of squares over a site's examples, by column; None where the task fits no statistics.

    Args:
        metrics: record of the reply.
        count: number of the examples.
        bounds: name and range of each standardised column; empty where the task fits no statistics.

    Raises:
        RefusedError: 412, not finite, or not those of columns within ``bounds``.
    """
    if not bounds:
        return None
    sums: list[tuple[float, ...]] = []
    for key in (protocol.FEATURE_TOTAL, protocol.FEATURE_TOTAL_OF_SQUARES):
        values = metrics.get(key)
        numbers = (
            [number_of(v) for v in values]
            if isinstance(values, list) and len(values) == len(bounds)
            else []
        )
        if len(numbers) != len(bounds) or any(n is None for n in numbers):
            raise RefusedError(
                412, f"{key}: must be {len(bounds)} finite numbers, got {printable(values)}"
            )
        sums.append(tuple(n for n in numbers if n is not None))
    for i, (name, low, high) in enumerate(bounds):
        mean, square = sums[0][i] / count, sums[1][i] / count
        # A mean square below the squared mean is impossible, and one far above the range comes from no honest site.
        minimum, maximum = mean * mean * (1 - 1e-6) - 1e-9, 100 * max(low * low, high * high)
        if not (low <= mean <= high and minimum <= square <= maximum):
            raise RefusedError(
                412,
                f"{name}: mean must be {low:g} to {high:g}, got {mean:.4g} (mean square {square:.4g})",
            )
    return Statistics(count, sums[0], sums[1])
