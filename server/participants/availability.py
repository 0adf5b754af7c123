"""Who is there at the start of a round: sites that joined, sites that left, and how long to wait for a quorum."""

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
    """The members of a run, and which of them a round does without.

    Attributes:
        census: registers those who come later.
        members: by site.
        news: rejections that the next round's line tells.
        missed: sites whose last request was not answered in time.
        away: sites that this round does not invite.
    """

    census: Registry
    members: dict[str, Member]
    news: list[Rejection]
    missed: set[str] = field(default_factory=set)
    away: set[str] = field(default_factory=set)

    def open(self, server_round: int, least: int) -> tuple[dict[str, Member], list[Rejection]]:
        """See who is there, and register who is new.

        A site that is not connected is invited all the same, as it may come back within the deadline; but not one
        that let a deadline pass already. Where fewer than ``least`` sites remain, this waits for a round's deadline.

        Returns:
            Members to invite from, by site, and why the others of the run are not among them.
        """
        link = self.census.live.link
        if not link.direct:
            started = told = link.clock.now()
            until = started + self.census.config.round.deadline

            def tick() -> None:
                nonlocal told
                now = link.clock.now()
                if now - told >= link.patience.telling:
                    told = now
                    phase = "connect" if link.failing_since is None else "superlink"
                    away = sorted(self.away)
                    self.census.listener.waiting(server_round, phase, away, now - started)

            while True:
                self._look(server_round, until, tick)
                now = link.clock.now()
                if len(self.members) - len(self.away) >= least or now >= until:
                    break
                tick()
                link.clock.sleep(min(_PAUSE, until - now))
        present = {s: m for s, m in sorted(self.members.items()) if s not in self.away}
        rejections = [*self.news, *self._away(), *self._unregistered()]
        self.news = []
        return present, rejections

    def note(self, asked: list[Member], result: Exchange) -> None:
        """Remember who let a deadline pass, and who has answered since."""
        silent = set(result.absent) | set(result.late)
        for member in asked:
            (self.missed.add if member.node_id in silent else self.missed.discard)(member.site)

    def gone(self) -> set[str]:
        """Sites that let a deadline pass and are not connected: to ask them once more would be in vain."""
        return {s for s in self.missed if self.members[s].node_id in self.census.live.gone}

    def _look(self, server_round: int, until: float, tick: Callable[[], None]) -> None:
        live, listener = self.census.live, self.census.listener
        sites = {m.node_id: m.site for m in self.members.values()}
        lost, back = live.look(sites, until, tick)
        for node in lost:
            listener.lost(server_round, sites[node], 0.0)
        for node, seconds in back:
            if node in sites:
                listener.back(server_round, sites[node], seconds)
        joined, refused = self.census.join(server_round)
        self.members = dict(sorted((self.members | joined).items()))
        self.news += refused
        self.away = self.gone()

    def _away(self) -> list[Rejection]:
        live = self.census.live
        return [
            Rejection(
                site,
                409,
                "absent",
                f"not invited: not connected for {live.away(self.members[site].node_id) or 0:.0f} s",
            )
            for site in sorted(self.away)
        ]

    def _unregistered(self) -> list[Rejection]:
        """Sites of the run that did not register since the coordinator's last start."""
        told = {r.site for r in self.news}
        return [
            Rejection(site, 409, "absent", "has not registered since the run was resumed")
            for site in self.census.journal.sites()
            if site not in self.members and site not in told
        ]
