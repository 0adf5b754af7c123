"""A registered site, and the checks of a registration."""

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
        site: name of the site.
        node_id: Flower's id of its node, in this Flower run.
        train_examples, test_examples: maximum numbers of examples that it may report, in any round.
    """

    site: str
    node_id: int
    train_examples: int
    test_examples: int


def dominant(
    admitted: Mapping[str, tuple[int, Registration]], before: Mapping[str, object], ratio: float
) -> dict[str, Rejection]:
    """Reject new sites whose registered number of training examples would outweigh the others'.

    A site's weight is bounded by the number that it registers, so that this number must be bounded too: by the
    others'. Fewer than three sites, and sites that the run already knows, are not checked.

    Args:
        admitted: site -> (node id, registration).
        before: the run's sites that are not new.
        ratio: maximum of a site's examples, in medians of the other sites' examples.

    Returns:
        Site -> rejection.
    """
    sizes = {site: r.train_examples for site, (_, r) in admitted.items()}
    rejections: dict[str, Rejection] = {}
    for site in sorted(sizes, key=lambda s: (-sizes[s], s)):
        others = [n for other, n in sizes.items() if other != site and other not in rejections]
        if len(others) < 2 or site in before:
            continue
        bound = int(ratio * statistics.median(others))
        if sizes[site] > bound:
            rejections[site] = Rejection(
                site,
                412,
                "rejected",
                f"examples: must be at most {bound} ({ratio:g} medians of the other sites, "
                f"admission.max-size-ratio), got {sizes[site]}",
            )
    return rejections


def admit_node(
    registration: Registration, node: int, admitted_nodes: Mapping[str, str]
) -> Registration | Rejection:
    """Check that a registration names the site under which the node's key was admitted.

    Args:
        registration: just admitted; the name in it is the site's own claim.
        node: id of the node that sent it, which Flower has authenticated by its key.
        admitted_nodes: site -> id of the node that the server has admitted for it, as text.

    Returns:
        The registration, or a rejection where the name is another.
    """
    if admitted_nodes.get(registration.site) == str(node):
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
    """Check that a registration agrees with the site's earlier ones in this run.

    Args:
        registration: just admitted.
        before: site -> its numbers of training and test examples, as journalled.
        admitted: site -> (node id, registration), of those since the coordinator's last start.

    Returns:
        The registration, or a rejection where the site is registered already or its numbers have changed.
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
        reply: reply of one node; untrusted input.
        node: name of the node for a rejection, where the reply holds no valid site name.
        run_id: fedge's id of the run.
        policy: the ``admission`` section, with the maximum number of examples.
        bounds: bounds of each standardised column's mean; empty where the task fits no statistics.
        sizes: the reply must hold numbers of examples; under secure aggregation it holds none, and 0 is recorded.

    Returns:
        The registration, or a rejection that says why there is none.
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
        counts = []
        for key, minimum in ((protocol.NUM_TRAIN_EXAMPLES, 1), (protocol.NUM_TEST_EXAMPLES, 0)):
            size = metrics.get(key)
            if type(size) is not int or not minimum <= size <= policy.max_examples:
                raise RefusedError(
                    412, f"{key}: must be {minimum} to {policy.max_examples}, got {printable(size)}"
                )
            counts.append(size)
        return Registration(site, counts[0], counts[1], statistics_of(metrics, counts[0], bounds))
    except RefusedError as refused:
        return Rejection(node, refused.code, refused.outcome, refused.reason)
