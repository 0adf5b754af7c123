"""A registered site, and how its word of its size binds it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from fedge.server.verdicts import Registration, Rejection


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


def seated(
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


def known(
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
