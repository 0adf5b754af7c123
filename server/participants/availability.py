"""Which sites are available at the start of a round: those that joined or disconnected, and the wait for a quorum."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from fedge.server.admission.validation_result import Rejection
from fedge.server.participants.members import Member
from fedge.server.participants.registration import Registry
from fedge.server.transport.exchange import Exchange

_log = logging.getLogger(__name__)
_PAUSE = 1.0


@dataclass
class Availability:
    """The members of a run, and which of them a round does not invite.

    Attributes:
        registry: registers sites that connect later.
        members: site -> member.
        new_rejections: refused registrations that the next round's record reports.
        timed_out: sites whose last request was not answered in time.
        not_invited: sites that this round does not invite: timed out and disconnected.
    """

    registry: Registry
    members: dict[str, Member]
    new_rejections: list[Rejection]
    timed_out: set[str] = field(default_factory=set)
    not_invited: set[str] = field(default_factory=set)

    def open(self, server_round: int, min_sites: int) -> tuple[dict[str, Member], list[Rejection]]:
        """Check which sites are connected, and register new ones.

        A disconnected site is invited all the same, as it may reconnect within the deadline; but not one that has
        timed out already. Where fewer than ``min_sites`` remain, this waits for them until a round's deadline.

        Args:
            server_round: from 1.
            min_sites: number of sites that the round needs.

        Returns:
            Members to invite from, by site, and why the other sites of the run are not among them.
        """
        grid_client = self.registry.node_status.grid_client
        if not grid_client.direct:
            started = reported_at = grid_client.clock.now()
            until = started + self.registry.config.round.deadline

            def tick() -> None:
                nonlocal reported_at
                now = grid_client.clock.now()
                if now - reported_at >= grid_client.timeouts.reporting:
                    reported_at = now
                    phase = "connect" if grid_client.failing_since is None else "superlink"
                    sites = sorted(self.not_invited)
                    self.registry.listener.waiting(server_round, phase, sites, now - started)

            while True:
                self._look(server_round, until, tick)
                now = grid_client.clock.now()
                if len(self.members) - len(self.not_invited) >= min_sites or now >= until:
                    break
                tick()
                grid_client.clock.sleep(min(_PAUSE, until - now))
        present = {s: m for s, m in sorted(self.members.items()) if s not in self.not_invited}
        rejections = [*self.new_rejections, *self._disconnected(), *self._unregistered()]
        self.new_rejections = []
        return present, rejections

    def note(self, members: list[Member], result: Exchange) -> None:
        """Record which members timed out in an exchange, and which have answered.

        Args:
            members: the members to which a request was sent.
            result: outcome of that exchange.
        """
        unanswered = set(result.timed_out) | set(result.late)
        for member in members:
            if member.node_id in unanswered:
                self.timed_out.add(member.site)
            else:
                self.timed_out.discard(member.site)

    def dropped_out(self) -> set[str]:
        """Sites that have timed out and are disconnected: another request would not reach them."""
        disconnected = self.registry.node_status.disconnected
        return {s for s in self.timed_out if self.members[s].node_id in disconnected}

    def _look(self, server_round: int, until: float, tick: Callable[[], None]) -> None:
        node_status, listener = self.registry.node_status, self.registry.listener
        sites = {m.node_id: m.site for m in self.members.values()}
        disconnected, reconnected = node_status.look(sites, until, tick)
        for node in disconnected:
            listener.disconnected(server_round, sites[node], 0.0)
        for node, seconds in reconnected:
            if node in sites:
                listener.reconnected(server_round, sites[node], seconds)
        joined, refused = self.registry.join(server_round)
        self.members = dict(sorted((self.members | joined).items()))
        self.new_rejections += refused
        self.not_invited = self.dropped_out()

    def _disconnected(self) -> list[Rejection]:
        node_status = self.registry.node_status
        return [
            Rejection(
                site,
                409,
                "absent",
                f"not invited: not connected for {node_status.disconnected_for(self.members[site].node_id) or 0:.0f} s",
            )
            for site in sorted(self.not_invited)
        ]

    def _unregistered(self) -> list[Rejection]:
        """A rejection for each site of the run that has not registered since the coordinator's last start."""
        rejected = {r.site for r in self.new_rejections}
        return [
            Rejection(site, 409, "absent", "has not registered since the run was resumed")
            for site in self.registry.journal.sites()
            if site not in self.members and site not in rejected
        ]
