"""A group of sites within one attempt: who is asked next, and when the group is given up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from flwr.app import RecordDict

from fedge.server.participants.members import Member
from fedge.server.secagg.group import Group
from fedge.server.secagg.outcome import NAMES
from fedge.shared.secagg import messages

#: The number with which a holder of a share finds fault with its dealer.
UNDECRYPTABLE: Final = 425


@dataclass
class GroupAttempt:
    """A group within an attempt.

    Attributes:
        members: who are asked.
        group: what has been heard; None where too few have answered.
        failed: why the group was given up.
        blames: by site, who finds fault with it, with the number that each gives.
        excluded: whom the next attempt is without.
        found_out: those of them that so many accuse that one honest site does.
    """

    members: list[Member]
    group: Group | None
    failed: str = ""
    blames: dict[str, dict[str, int]] = field(default_factory=dict)
    excluded: set[str] = field(default_factory=set)
    found_out: set[str] = field(default_factory=set)

    def left(self, kind: str) -> set[str]:
        """Who is asked in this exchange."""
        group = self.group
        if group is None:
            return set()
        if kind == messages.SHARE:
            return set(group.bundles)
        return set(group.sharers)

    def check(self, kind: str, min_sites: int) -> list[str]:
        """Give the group up where fewer are left than its sites will ask for, or where somebody is found out.

        Returns:
            Whom others blame for it, so that the next attempt is without them.
        """
        group = self.group
        if group is None:
            return []
        done = {
            messages.SHARE: group.sharers,
            messages.MASKED: group.survivors,
        }[kind]
        least = max(group.threshold, min_sites)
        # No site has heard of one that is not in the group: whoever blames it lies.
        liars = {s for peer, by in self.blames.items() if peer not in group.bundles for s in by}
        blamed = {peer: by for peer, by in self.blames.items() if peer in group.bundles}
        self.found_out = {peer for peer, by in blamed.items() if _is_found_out(group, peer, by)}
        if len(done) >= least and not self.found_out:
            return []
        self.failed = f"{NAMES[kind]}: must be answered by {least} sites, got {len(done)}"
        if len(done) >= least:
            # In a sparse graph: all others are enough, but too few of them hold shares of these.
            names = ", ".join(sorted(self.found_out))
            self.failed = f"{NAMES[kind]}: must be without those found out, got {names}"
        self.group = None
        self.excluded |= liars
        if self.found_out:
            # They explain the loss, so nobody else is excluded for what they or others say: they may be accusing honest
            # sites. What is true of others will be said again.
            self.excluded |= self.found_out
            return sorted(self.found_out)
        for peer, by in blamed.items():
            # One accuser and one accused: one of the two is at fault, and nobody can tell which. Of several accusers
            # all may lie, so that the accused is out of this round alone.
            self.excluded |= {peer} if len(by) > 1 else {peer, *by}
        return sorted(blamed)


def is_agreed(accusers: int, witnesses: int) -> bool:
    """Whether so many of those who can see a fault say it that at least one of them is honest.

    An accusation is one site's word against another's: either may lie. But fewer than a third of ``min-sites`` are
    corrupt, and so fewer than a third of the witnesses, who are as many or more. Thus more than a third never agree on
    an honest site; and who deals bad shares to all is accused by every honest holder, more than two thirds. In between
    a dealer harms too few to lose a sum by that alone.
    """
    return 3 * accusers > witnesses


def _is_found_out(group: Group, peer: str, by: Mapping[str, int]) -> bool:
    # Keys and signatures are seen by all; an encrypted share by its holder alone, and in a sparse graph the share of
    # corrupt holders is bounded as the threshold's is (neighbour_graph). The accused is a witness, never an accuser.
    # A secret opens with more than two thirds of its holders: without so many the sum is lost in any case.
    near = group.neighbours[peer]
    holders = sum(code == UNDECRYPTABLE and site in near for site, code in by.items())
    return is_agreed(holders, len(near) + 1) or is_agreed(len(by.keys() - {peer}), len(group.sites))


def lost_at(group: Group | None, site: str) -> str:
    """The exchange of which a group has no answer of a site; empty where its vector is in the sum."""
    if group is None or site in group.survivors:
        return ""
    if site in group.sharers:
        return NAMES[messages.MASKED]
    return NAMES[messages.SHARE] if site in group.bundles else "begin"


#: Exchanges 1 and 2: what a site is told, and what becomes of its answer.
STEPS: Final[
    Sequence[
        tuple[
            str,
            Callable[[Group, str], Mapping[str, bytes]],
            Callable[[Group, str, RecordDict], object],
        ]
    ]
] = (
    (
        messages.SHARE,
        lambda group, _: group.share_values(),
        lambda group, site, content: group.take_share(site, messages.values_of(content)),
    ),
    (messages.MASKED, Group.masked_values, Group.take_masked),
)
