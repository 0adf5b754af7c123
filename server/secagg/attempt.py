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


@dataclass
class GroupAttempt:
    """A group within an attempt.

    Attributes:
        members: who are asked.
        group: what has been heard; None where too few have answered.
        failed: why the group was given up.
        blames: by site, who finds fault with it.
        excluded: whom the next attempt is without.
        untrusted: those of them that no roster trusts, as more than one site says.
    """

    members: list[Member]
    group: Group | None
    failed: str = ""
    blames: dict[str, set[str]] = field(default_factory=dict)
    excluded: set[str] = field(default_factory=set)
    untrusted: set[str] = field(default_factory=set)

    def left(self, kind: str) -> set[str]:
        """Who is asked in this exchange."""
        group = self.group
        if group is None:
            return set()
        if kind == messages.SHARE:
            return set(group.bundles)
        return set(group.sharers)

    def check(self, kind: str, min_sites: int) -> list[str]:
        """Give the group up where fewer are left than its sites will ask for.

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
        if len(done) >= least:
            return []
        self.failed = f"{NAMES[kind]}: must be answered by {least} sites, got {len(done)}"
        self.group = None
        members = {m.site for m in self.members}
        blamed = {peer: by for peer, by in self.blames.items() if peer in members}
        for peer, by in blamed.items():
            # One accuser and one accused: one of the two is at fault, and nobody can tell which.
            self.excluded |= {peer} if len(by) > 1 else {peer, *by}
        return sorted(blamed)


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
