"""The admission gate: every reply of every strategy passes here before anything is added up.

Pure functions from a reply, which may hold anything, to an admitted value or a ``Rejection`` that says why. A rejected
site is out for the rest of the round, and the round goes on. The table is docs/explanation/admission.md.
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
    opened,
)
from fedge.server.admission.validation_result import Evaluation, Expected, Rejection, Verdict
from fedge.server.aggregation.updates import Update

#: How far above the median of a round a loss may lie that decides a weight; and the least median taken for that.
_LOSS_RATIO, _LOSS_FLOOR = 100.0, 0.1


def admit_train(reply: Message, site: str, registered: int, expected: Expected) -> Verdict:
    """Admit or reject one site's update.

    Args:
        reply: from the node that registered as ``site``.
        site: that name.
        registered: training examples that the site registered; it may claim fewer, never more.
        expected: of this round.
    """
    try:
        arrays, metrics = opened(reply, site, expected, with_arrays=True)
        num_examples = examples_of(metrics, registered)
        loss, drops = loss_of(metrics, site, expected)
        decoded = arrays_of(arrays, expected)
        spent, more = epsilon_of(metrics, site) if expected.private else (None, [])
        ledger = ledger_of(reply.content) if expected.private else None
        update = Update(site, decoded, num_examples, loss, spent, ledger)
        return Verdict(update=update, drops=[*drops, *more])
    except RefusedError as refused:
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
        _, metrics = opened(reply, site, expected, with_arrays=False)
        noised = expected.noised
        # Where whole sites are hidden, each counts as one.
        whole = noised is not None and noised.unit == "site"
        num_examples = examples_of(metrics, 1 if whole else registered)
        counters, drops = counters_of(metrics, site, num_examples, expected)
        if noised is None:
            return Verdict(evaluation=Evaluation(site, counters), drops=drops)
        spent, more = epsilon_of(metrics, site)
        found = Evaluation(site, counters, spent, ledger_of(reply.content))
        return Verdict(evaluation=found, drops=[*drops, *more])
    except RefusedError as refused:
        return Verdict(rejection=Rejection(site, refused.code, refused.outcome, refused.reason))
