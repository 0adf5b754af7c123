"""The admission gate: every reply of every strategy is validated here before it is aggregated.

Pure functions from a reply, which is untrusted input, to an admitted value or a ``Rejection`` with the reason. A
rejected site is excluded for the rest of the round, and the round goes on. The table is docs/explanation/admission.md.
"""

from __future__ import annotations

import statistics

from flwr.app import Message

from fedge.server.admission.reply_fields import (
    RefusedError,
    arrays_of,
    counters_of,
    epsilon_of,
    examples_of,
    ledger_of,
    loss_of,
    records_of,
)
from fedge.server.admission.validation_result import Evaluation, Expected, Rejection, Verdict
from fedge.server.aggregation.updates import Update

#: Maximum ratio of a loss that decides a weight to the round's median loss; and the minimum taken for that median.
_LOSS_RATIO, _LOSS_FLOOR = 100.0, 0.1


def admit_train(reply: Message, site: str, registered_examples: int, expected: Expected) -> Verdict:
    """Admit or reject one site's update.

    Args:
        reply: reply of the node that registered as ``site``.
        site: name of the site.
        registered_examples: number of training examples that the site registered; it may claim fewer, never more.
        expected: what a reply of this round must look like.

    Returns:
        The update, or its rejection, with the metrics that were left out.
    """
    try:
        arrays, metrics = records_of(reply, site, expected, with_arrays=True)
        num_examples = examples_of(metrics, registered_examples)
        loss, drops = loss_of(metrics, site, expected)
        decoded = arrays_of(arrays, expected)
        spent, more = epsilon_of(metrics, site, expected.delta) if expected.private else (None, [])
        ledger = ledger_of(reply.content) if expected.private else None
        update = Update(site, decoded, num_examples, loss, spent, ledger)
        return Verdict(update=update, drops=[*drops, *more])
    except RefusedError as refused:
        return Verdict(rejection=Rejection(site, refused.code, refused.outcome, refused.reason))


def admit_losses(updates: list[Update]) -> tuple[list[Update], list[Rejection]]:
    """Reject updates whose loss is far above the others', where the loss is the weight: they would dominate the mean.

    Args:
        updates: admitted one by one; fewer than three cannot be compared and are kept.

    Returns:
        The updates that are kept, and a rejection for each of the others.
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


def admit_evaluate(
    reply: Message, site: str, registered_examples: int, expected: Expected
) -> Verdict:
    """Admit or reject one site's evaluation; arguments as in ``admit_train``, of test examples."""
    try:
        _, metrics = records_of(reply, site, expected, with_arrays=False)
        noised = expected.noised
        # How many examples noised counts are over is not told.
        num_examples = examples_of(metrics, 1 if noised is not None else registered_examples)
        counters, drops = counters_of(metrics, site, num_examples, expected)
        if noised is None:
            return Verdict(evaluation=Evaluation(site, counters), drops=drops)
        spent, more = epsilon_of(metrics, site, expected.delta)
        evaluation = Evaluation(site, counters, spent, ledger_of(reply.content))
        return Verdict(evaluation=evaluation, drops=[*drops, *more])
    except RefusedError as refused:
        return Verdict(rejection=Rejection(site, refused.code, refused.outcome, refused.reason))
