"""A registered site, and how its word of its size binds it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message

from fedge.server.admission.reply_fields import (
    RefusedError,
    config_of,
    content_of,
    metrics_of,
    must_answer,
    statistics_of,
)
from fedge.server.admission.validation_result import Registration, Rejection, printable
from fedge.shared import protocol
from fedge.shared.config.sections import AdmissionSection
from fedge.shared.protocol import SITE_NAME
from fedge.shared.tasks.standardised_columns import Bound


@dataclass(frozen=True)
class Member:
    """A registered site.

    Attributes:
        node_id: Flower's, in this Flower run.
        train_examples, test_examples: the most that it may report, in any round.
    """

    site: str
    node_id: int
    train_examples: int
    test_examples: int


def dominant(
    admitted: Mapping[str, tuple[int, Registration]], before: Mapping[str, object], ratio: float
) -> dict[str, Rejection]:
    """New sites that would outweigh the others by what they say of themselves.

    A site's weight is bounded by what it registers, so that word must be bounded too: by the others'.
    Fewer than three sites, and sites that the run already knows, are left alone.
    """
    sizes = {site: r.train_examples for site, (_, r) in admitted.items()}
    found: dict[str, Rejection] = {}
    for site in sorted(sizes, key=lambda s: (-sizes[s], s)):
        others = [n for other, n in sizes.items() if other != site and other not in found]
        if len(others) < 2 or site in before:
            continue
        bound = int(ratio * statistics.median(others))
        if sizes[site] > bound:
            found[site] = Rejection(
                site,
                412,
                "rejected",
                f"examples: must be at most {bound} ({ratio:g} medians of the other sites, "
                f"admission.max-size-ratio), got {sizes[site]}",
            )
    return found


def admit_node(
    registration: Registration, node: int, seats: Mapping[str, str]
) -> Registration | Rejection:
    """The registration, or a refusal where the name is not the one under which this node's key was admitted.

    Args:
        registration: just admitted; the name in it is the site's own word.
        node: that sent it, which Flower has told by its key.
        seats: number of the node of each admitted site, as text.
    """
    if seats.get(registration.site) == str(node):
        return registration
    return Rejection(
        registration.site,
        412,
        "rejected",
        "site: must be the name under which the server admitted this key, got another",
    )


def admit_again(
    registration: Registration,
    before: dict[str, tuple[int, int]],
    admitted: dict[str, tuple[int, Registration]],
) -> Registration | Rejection:
    """The registration, or why it does not fit what the run has heard before.

    Args:
        registration: just admitted.
        before: sizes of the run's sites, as journalled.
        admitted: who registered since the coordinator's last start.
    """
    site = registration.site
    if site in admitted:
        return Rejection(site, 412, "duplicate", f"site: must be unique, got a second {site}")
    now = (registration.train_examples, registration.test_examples)
    if before.get(site, now) != now:
        then = "{} to train and {} to test".format(*before[site])
        return Rejection(
            site, 412, "rejected", f"examples: must be {then} as before, got {now[0]} and {now[1]}"
        )
    return registration


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
