"""The admission gate: every reply of every strategy passes here before anything is added up.

Pure functions from a reply, which may hold anything, to an admitted value or a ``Rejection`` that says why. A rejected
site is out for the rest of the round, and the round goes on. The table is docs/explanation/admission.md.
"""

from __future__ import annotations

import re
import statistics

from flwr.app import Message

from fedge.server.reply import (
    RefusedError,
    arrays_of,
    config_of,
    content_of,
    counters_of,
    epsilon_of,
    examples_of,
    ledger_of,
    loss_of,
    metrics_of,
    must_answer,
    opened,
    statistics_of,
)
from fedge.server.results import Update
from fedge.server.verdicts import Evaluation, Expected, Registration, Rejection, Verdict, printable
from fedge.shared import protocol
from fedge.shared.config import AdmissionSection
from fedge.shared.section import SITE_NAME
from fedge.shared.tasks.columns import Bound

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
        config = config_of(content_of(reply, {protocol.CONFIG, protocol.METRICS}))
        must_answer(config, run_id, 0)
        site = config.get(protocol.SITE)
        if not isinstance(site, str) or re.fullmatch(SITE_NAME, site) is None:
            raise RefusedError(
                412,
                f"site: must be lower-case letters, digits and hyphens, got {printable(site)!r}",
            )
        node = site
        metrics = metrics_of(reply.content)
        if not sizes:
            return Registration(site, 0, 0, None)
        found = []
        for key, least in ((protocol.NUM_TRAIN_EXAMPLES, 1), (protocol.NUM_TEST_EXAMPLES, 0)):
            size = metrics.get(key)
            if type(size) is not int or not least <= size <= policy.max_examples:
                raise RefusedError(
                    412, f"{key}: must be {least} to {policy.max_examples}, got {printable(size)}"
                )
            found.append(size)
        return Registration(site, found[0], found[1], statistics_of(metrics, found[0], bounds))
    except RefusedError as refused:
        return Rejection(node, refused.code, refused.outcome, refused.reason)
