"""The admission gate: every reply of every strategy passes here before anything is added up.

Pure functions from a reply, which may hold anything, to an admitted value or a ``Rejection`` that says why. Nothing
that a site sends is trusted: not its names, types, shapes, sizes or numbers; nor is its text repeated at length. A
rejected site is out for the rest of the round, and the round goes on. The table is docs/explanation/admission.md.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedge.server.results import Update
from fedge.server.verdicts import (
    Drop,
    Evaluation,
    Expected,
    Outcome,
    Registration,
    Rejection,
    Verdict,
    printable,
    reported_words,
)
from fedge.shared import protocol
from fedge.shared.arrays import NDArrays
from fedge.shared.config import AdmissionSection
from fedge.shared.decode import UndecodableError, decode
from fedge.shared.preprocess import Statistics
from fedge.shared.section import SITE_NAME
from fedge.shared.tasks.columns import Bound

#: More values than any task reports; and the farthest that an integer tensor may move in a round.
_MOST_METRICS, _COUNTER_STEP = 64, 1e9
_MOST_EPSILON = 1e9
_SPENT = (protocol.EPSILON_CONSUMERS, protocol.EPSILON_SERVER)
_PRIVATE = (protocol.NUM_EXAMPLES, *_SPENT)


#: How far above the median of a round a loss may lie that decides a weight; and the least median taken for that.
_LOSS_RATIO, _LOSS_FLOOR = 100.0, 0.1


class _RefusedError(Exception):
    def __init__(self, code: int, reason: str, outcome: Outcome = "rejected") -> None:
        super().__init__(reason)
        self.code, self.reason, self.outcome = code, reason, outcome


def admit_train(reply: Message, site: str, registered: int, expected: Expected) -> Verdict:
    """Admit or reject one site's update.

    Args:
        reply: from the node that registered as ``site``.
        site: that name.
        registered: training examples that the site registered; it may claim fewer, never more.
        expected: of this round.
    """
    try:
        arrays, metrics = _open(reply, site, expected, with_arrays=True)
        num_examples = _num_examples(metrics, registered)
        loss, drops = _train_metrics(metrics, site, expected)
        decoded = _arrays(arrays, expected)
        spent, more = _epsilon(metrics, site) if expected.private else (None, [])
        ledger = ledger_of(reply.content) if expected.private else None
        update = Update(site, decoded, num_examples, loss, spent, ledger)
        return Verdict(update=update, drops=[*drops, *more])
    except _RefusedError as refused:
        return Verdict(rejection=Rejection(site, refused.code, refused.outcome, refused.reason))


def admit_losses(updates: list[Update]) -> tuple[list[Update], list[Rejection]]:
    """Where the loss is the weight, one far above the others' would be a takeover: refuse it.

    Args:
        updates: admitted one by one; fewer than three cannot be compared and are kept.
    """
    losses = [u.train_loss or 0.0 for u in updates]
    if len(losses) < 3:
        return updates, []
    bound = _LOSS_RATIO * max(statistics.median(losses), _LOSS_FLOOR)
    kept = [u for u, loss in zip(updates, losses, strict=True) if loss <= bound]
    reason = f"train-loss: must be at most {bound:g} beside the others, got "
    return kept, [
        Rejection(u.site, 401, "rejected", f"{reason}{loss:g}")
        for u, loss in zip(updates, losses, strict=True)
        if loss > bound
    ]


def admit_evaluate(reply: Message, site: str, registered: int, expected: Expected) -> Verdict:
    """Admit or reject one site's evaluation; ``registered`` counts test examples."""
    try:
        _, metrics = _open(reply, site, expected, with_arrays=False)
        noised = expected.noised
        # Where whole sites are hidden, each counts as one.
        whole = noised is not None and noised.unit == "site"
        num_examples = _num_examples(metrics, 1 if whole else registered)
        counters, drops = _counters(metrics, site, num_examples, expected)
        if noised is None:
            return Verdict(evaluation=Evaluation(site, counters), drops=drops)
        spent, more = _epsilon(metrics, site)
        found = Evaluation(site, counters, spent, ledger_of(reply.content))
        return Verdict(evaluation=found, drops=[*drops, *more])
    except _RefusedError as refused:
        return Verdict(rejection=Rejection(site, refused.code, refused.outcome, refused.reason))


def admit_registration(
    reply: Message,
    node: str,
    run_id: str,
    policy: AdmissionSection,
    bounds: tuple[Bound, ...],
    *,
    sizes: bool = True,
) -> Registration | Rejection:
    """Admit a site to the run.

    Args:
        reply: of one node.
        node: how to call it until its name is known.
        run_id: fedge's run.
        policy: bounds.
        bounds: of each standardised column's mean; empty where the task learns no statistics.
        sizes: the site must say how many examples it has; under masks it says nothing, and none are noted.
    """
    try:
        config = _config(_content(reply, {protocol.CONFIG, protocol.METRICS}))
        _answers(config, run_id, 0)
        site = config.get(protocol.SITE)
        if not isinstance(site, str) or re.fullmatch(SITE_NAME, site) is None:
            raise _RefusedError(
                412,
                f"site: must be lower-case letters, digits and hyphens, got {printable(site)!r}",
            )
        node = site
        metrics = _metrics(reply.content)
        if not sizes:
            return Registration(site, 0, 0, None)
        found = []
        for key, least in ((protocol.NUM_TRAIN_EXAMPLES, 1), (protocol.NUM_TEST_EXAMPLES, 0)):
            size = metrics.get(key)
            if type(size) is not int or not least <= size <= policy.max_examples:
                raise _RefusedError(
                    412, f"{key}: must be {least} to {policy.max_examples}, got {printable(size)}"
                )
            found.append(size)
        return Registration(site, found[0], found[1], _statistics(metrics, found[0], bounds))
    except _RefusedError as refused:
        return Rejection(node, refused.code, refused.outcome, refused.reason)


def _content(reply: Message, records: set[str]) -> RecordDict:
    if reply.has_error():
        raise _RefusedError(410, reported_words(reply.error), "error")
    if not reply.has_content():
        raise _RefusedError(411, "the reply is empty")
    names = set(reply.content.keys())
    if names != records:
        raise _RefusedError(
            411, f"records: must be {sorted(records)}, got {printable(sorted(names))}"
        )
    return reply.content


def _config(content: RecordDict) -> ConfigRecord:
    config = content[protocol.CONFIG]
    if not isinstance(config, ConfigRecord):
        raise _RefusedError(
            411, f"{protocol.CONFIG}: must be a ConfigRecord, got {type(config).__name__}"
        )
    return config


def _metrics(content: RecordDict) -> MetricRecord:
    metrics = content[protocol.METRICS]
    if not isinstance(metrics, MetricRecord):
        raise _RefusedError(
            411, f"{protocol.METRICS}: must be a MetricRecord, got {type(metrics).__name__}"
        )
    if len(metrics) > _MOST_METRICS:
        # Each unknown metric is told of by name; without a bound a site could fill the journal.
        raise _RefusedError(
            411, f"{protocol.METRICS}: must hold at most {_MOST_METRICS} values, got {len(metrics)}"
        )
    return metrics


def _answers(config: ConfigRecord, run_id: str, server_round: int) -> None:
    answered = (config.get(protocol.RUN_ID), config.get(protocol.SERVER_ROUND))
    if answered != (run_id, server_round) or type(answered[1]) is not int:
        shown = f"run {printable(answered[0])}, round {printable(answered[1])}"
        raise _RefusedError(
            406, f"must answer run {run_id}, round {server_round}, got {shown}", "stale"
        )


def _open(
    reply: Message, site: str, expected: Expected, *, with_arrays: bool
) -> tuple[ArrayRecord, MetricRecord]:
    records = {protocol.CONFIG, protocol.METRICS} | ({protocol.ARRAYS} if with_arrays else set())
    content = _content(reply, records)
    config = _config(content)
    _answers(config, expected.run_id, expected.server_round)
    if config.get(protocol.SITE) != site:
        raise _RefusedError(
            411, f"site: must be {site}, got {printable(config.get(protocol.SITE))}"
        )
    arrays = content[protocol.ARRAYS] if with_arrays else ArrayRecord()
    if not isinstance(arrays, ArrayRecord):
        raise _RefusedError(
            411, f"{protocol.ARRAYS}: must be an ArrayRecord, got {type(arrays).__name__}"
        )
    return arrays, _metrics(content)


def _num_examples(metrics: MetricRecord, registered: int) -> int:
    value = metrics.get(protocol.NUM_EXAMPLES)
    if type(value) is not int or not 1 <= value <= registered:
        raise _RefusedError(
            403,
            f"{protocol.NUM_EXAMPLES}: must be 1 to {registered} as registered, got {printable(value)}",
        )
    return value


def _number(value: object) -> float | None:
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
    found = config.get(protocol.PRIVACY_LEDGER) if isinstance(config, ConfigRecord) else None
    return found if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{64}", found) else None


def _epsilon(metrics: MetricRecord, site: str) -> tuple[tuple[float, float] | None, list[Drop]]:
    """What the site says to have spent; figures that cannot be are left out, and the update counts."""
    consumers, server = (_number(metrics.get(key)) for key in _SPENT)
    if metrics.get(protocol.EPSILON_SERVER) == math.inf:
        # It got updates without noise.
        server = math.inf
    if consumers is not None and server is not None:
        bounded = 0 <= server <= _MOST_EPSILON or server == math.inf
        if 0 <= consumers <= _MOST_EPSILON and bounded:
            return (consumers, server), []
    reason = f"must be 0 to {_MOST_EPSILON:g}"
    return None, [Drop(site, key, reason) for key in _SPENT]


def _train_metrics(
    metrics: MetricRecord, site: str, expected: Expected
) -> tuple[float | None, list[Drop]]:
    known = _PRIVATE if expected.private else (protocol.NUM_EXAMPLES, protocol.TRAIN_LOSS)
    drops = [
        Drop(site, printable(key), "not a metric of this task")
        for key in metrics
        if key not in known
    ]
    if expected.private:
        return None, drops
    raw = metrics.get(protocol.TRAIN_LOSS)
    loss, bound = _number(raw), expected.policy.max_loss
    if loss is not None and 0 <= loss <= bound:
        return loss, drops
    reason = f"must be 0 to {bound:g}, got {printable(raw)}"
    if expected.needs_loss:
        raise _RefusedError(401, f"{protocol.TRAIN_LOSS}, by which the strategy weighs: {reason}")
    return None, [*drops, Drop(site, protocol.TRAIN_LOSS, reason)]


def _counters(
    metrics: MetricRecord, site: str, num_examples: int, expected: Expected
) -> tuple[dict[str, float], list[Drop]]:
    counters: dict[str, float] = {}
    drops: list[Drop] = []
    for key, raw in metrics.items():
        if key == protocol.NUM_EXAMPLES or (expected.noised is not None and key in _SPENT):
            continue
        if key not in expected.counters:
            drops.append(Drop(site, printable(key), "not a metric of this task"))
            continue
        value = _number(raw)
        bound = num_examples * (expected.policy.max_loss if key == "loss-sum" else 1.0)
        least = num_examples if key == "examples" else 0.0
        if expected.noised is not None and key in expected.noised.noised:
            # Noise may carry it beyond its range; it is the metrics that are held to theirs.
            least, bound = -expected.noised.reach, num_examples + expected.noised.reach
        if value is None or not least <= value <= bound:
            drops.append(Drop(site, key, f"must be {least:g} to {bound:g}, got {printable(raw)}"))
        else:
            counters[key] = value
    missing = [key for key in expected.counters if key not in metrics]
    drops += [Drop(site, key, "missing") for key in missing]
    return counters, drops


def _arrays(arrays: ArrayRecord, expected: Expected) -> NDArrays:
    names, wanted = set(arrays.keys()), set(expected.reference)
    if names != wanted:
        missing, extra = sorted(wanted - names), sorted(names - wanted)
        raise _RefusedError(
            404, f"tensors: missing {printable(missing)}, unknown {printable(extra)}"
        )
    decoded: NDArrays = {}
    squares = {"update": 0.0, "control": 0.0}
    for name, reference in expected.reference.items():
        try:
            value = decode(arrays[name], reference.shape, reference.dtype)
        except UndecodableError as error:
            raise _RefusedError(404, f"{name}: {printable(str(error), 160)}") from None
        decoded[name] = value
        if value.dtype.kind in "iu":
            # Counters, as of batches: they may step far, but not so far that a mean overflows.
            if (
                np.abs(value.astype(np.float64) - reference.astype(np.float64)).max(initial=0)
                > _COUNTER_STEP
            ):
                raise _RefusedError(
                    402, f"{name}: must step by at most {_COUNTER_STEP:g}, got more"
                )
            continue
        if value.dtype.kind not in "fc":
            continue
        if not np.isfinite(value).all():
            raise _RefusedError(401, f"{name}: must be finite, got NaN or infinity")
        control = name.startswith(protocol.CONTROL_PREFIX)
        difference = value.astype(np.float64) - (0.0 if control else reference.astype(np.float64))
        squares["control" if control else "update"] += float(np.vdot(difference, difference).real)
    policy = expected.policy
    most = policy.max_update_norm + expected.noise_norm
    for what, bound in (("update", most), ("control", policy.max_control_norm)):
        norm = math.sqrt(squares[what])
        if not norm <= bound:
            raise _RefusedError(402, f"{what} norm: must be at most {bound:g}, got {norm:.4g}")
    return decoded


def _statistics(
    metrics: Mapping[str, Any], count: int, bounds: tuple[Bound, ...]
) -> Statistics | None:
    if not bounds:
        return None
    sums: list[tuple[float, ...]] = []
    for key in (protocol.FEATURE_TOTAL, protocol.FEATURE_TOTAL_OF_SQUARES):
        values = metrics.get(key)
        numbers = (
            [_number(v) for v in values]
            if isinstance(values, list) and len(values) == len(bounds)
            else []
        )
        if len(numbers) != len(bounds) or any(n is None for n in numbers):
            raise _RefusedError(
                412, f"{key}: must be {len(bounds)} finite numbers, got {printable(values)}"
            )
        sums.append(tuple(n for n in numbers if n is not None))
    for i, (name, low, high) in enumerate(bounds):
        mean, square = sums[0][i] / count, sums[1][i] / count
        # A mean square below the squared mean belongs to no data, one far above the range's to no honest site.
        least, largest = mean * mean * (1 - 1e-6) - 1e-9, 100 * max(low * low, high * high)
        if not (low <= mean <= high and least <= square <= largest):
            raise _RefusedError(
                412,
                f"{name}: mean must be {low:g} to {high:g}, got {mean:.4g} (mean square {square:.4g})",
            )
    return Statistics(count, sums[0], sums[1])
