"""Who takes part: nodes register as sites, once a run, and their word of size binds them."""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedge.server.admission.validation_result import Registration, Rejection
from fedge.server.participants import messages
from fedge.server.participants.members import (
    Member,
    admit_again,
    admit_node,
    admit_registration,
    dominant,
)
from fedge.server.runs.journal import Journal
from fedge.server.runs.listener import Listener
from fedge.server.transport.delivery import DeliveryEvents
from fedge.server.transport.exchange import exchange
from fedge.server.transport.node_status import NodeStatus
from fedge.shared.config.federation import Config
from fedge.shared.errors import RunError
from fedge.shared.preprocessing.steps import Statistics
from fedge.shared.tasks.standardised_columns import column_bounds
from fedge.shared.tasks.task import Task

_log = logging.getLogger(__name__)
_PAUSE = 0.5
#: How often the pause until a silent node is asked again doubles, at most.
_MAX_PAUSE_DOUBLINGS = 4
#: How often the time for its answer doubles, at most; the round waits for it.
_MAX_DEADLINE_DOUBLINGS = 2


@dataclass
class Registry:
    """The registry of one Flower run.

    Attributes:
        seats: gives Flower's node of each site that the server has admitted; None where nobody admits (simulation).
        admitted: by site, its node and what it said of itself.
        refused: by node, why it may not take part.
    """

    live: NodeStatus
    config: Config
    task: Task
    run_id: str
    journal: Journal
    listener: Listener
    seats: Callable[[], Mapping[str, str]] | None = None
    admitted: dict[str, tuple[int, Registration]] = field(default_factory=dict)
    refused: dict[int, Rejection] = field(default_factory=dict)
    _asked: dict[int, tuple[int, float]] = field(default_factory=dict)
    _told: float = 0.0

    def take(self, flower_run_id: int) -> tuple[dict[str, Member], list[Rejection]]:
        """Register every node that the grid lists, and wait for as many as the configuration names.

        Returns:
            Members by site, in name order, and refused registrations.

        Raises:
            RunError: 501, fewer than ``round.min-sites`` before the deadline, or the SuperLink does not answer;
                502, a required site is missing.
        """
        config, clock = self.config, self.live.link.clock
        wanted = (
            config.sites.count if config.data.partition != "natural" else config.round.min_sites
        )
        needed = max(wanted, config.round.min_sites)
        started = self._told = clock.now()
        deadline = started + config.round.deadline
        bound = min(config.round.deadline, self.live.link.patience.registration)
        while True:
            new = self._new(deadline, "connect", started)
            left = deadline - clock.now()
            if new and left > 0:
                self._register(0, new, min(left, bound))
            left = deadline - clock.now()
            if len(self.admitted) >= needed or left <= 0:
                break
            if len(self.admitted) + len(self.refused) >= needed:
                # Everybody who was expected has spoken; those refused will not improve by waiting.
                break
            enough = len(self.admitted) >= config.round.min_sites
            if enough and len(self._members() | set(self._asked)) >= needed:
                # Who is connected and does not answer may join later.
                break
            self._tell(0, "connect", started)
            clock.sleep(min(_PAUSE, left))
        self._weigh(self.admitted)
        members = self._write_down(self.admitted)
        _log.info(
            "Flower run %s: %d sites registered, %d refused",
            flower_run_id,
            len(members),
            len(self.refused),
        )
        self._require(members)
        return members, [*self.refused.values(), *self._silent()]

    def join(self, server_round: int) -> tuple[dict[str, Member], list[Rejection]]:
        """Register nodes that have connected since, at most once a minute; those in the last look count.

        Nodes that did not answer, or whose worker failed, are asked again after pauses that double.
        """
        patience, now = self.live.link.patience, self.live.link.clock.now()
        last = max((at for _, at in self._asked.values()), default=-math.inf)
        new = [
            node
            for node in sorted(self.live.listed - self._members())
            if not self._is_final(node)
            and now - self._asked.get(node, (0, -math.inf))[1] >= self._pause(node)
        ]
        if not new or now - last < patience.joining_again:
            return {}, []
        before, refused = set(self.admitted), dict(self.refused)
        for node in new:
            self.refused.pop(node, None)
        # Over a slow line an answer takes a minute: who was asked in vain has more time with each attempt.
        times = max(self._asked.get(node, (0, 0.0))[0] for node in new)
        bound = patience.joining * 2.0 ** min(times, _MAX_DEADLINE_DOUBLINGS)
        self._register(server_round, new, min(bound, self.config.round.deadline))
        joined = {site: self.admitted[site] for site in set(self.admitted) - before}
        self._weigh(joined)
        members = self._write_down({s: v for s, v in joined.items() if s in self.admitted})
        fresh = [r for node, r in self.refused.items() if refused.get(node) != r]
        _log.info("round %d: %d sites joined", server_round, len(members))
        return members, fresh

    def known_of(self, site: str) -> str:
        """What is known of a site that is not among the members."""
        for rejection in self.refused.values():
            if rejection.site == site:
                return f"refused, FE-{rejection.code} {rejection.reason}"
        if site in self.journal.sites():
            return "not registered since the run was resumed"
        return "never registered"

    def _members(self) -> set[int]:
        return {node for node, _ in self.admitted.values()}

    def _is_final(self, node: int) -> bool:
        """A site that failed may recover; one that was refused will not."""
        return node in self.refused and self.refused[node].outcome != "error"

    def _pause(self, node: int) -> float:
        times = self._asked.get(node, (0, 0.0))[0]
        return self.live.link.patience.joining_again * 2.0 ** min(
            max(times - 1, 0), _MAX_PAUSE_DOUBLINGS
        )

    def _new(self, until: float, phase: str, started: float) -> list[int]:
        self.live.look((), until, lambda: self._tell(0, phase, started))
        return sorted(self.live.listed - self._members() - set(self.refused))

    def _tell(self, server_round: int, phase: str, started: float) -> None:
        now = self.live.link.clock.now()
        if now - self._told >= self.live.link.patience.telling:
            self._told = now
            if self.live.link.failing_since is not None:
                phase = "superlink"
            awaited = set(self.config.round.require_sites) | set(self.journal.sites())
            self.listener.waiting(
                server_round, phase, sorted(awaited - set(self.admitted)), now - started
            )

    def _silent(self) -> list[Rejection]:
        return [
            Rejection(f"node {node}", 409, "absent", "connected, but no answer to the registration")
            for node in sorted(set(self._asked) - self._members() - set(self.refused))
        ]

    def _register(self, server_round: int, nodes: Sequence[int], deadline: float) -> None:
        for node in nodes:
            times, _ = self._asked.get(node, (0, 0.0))
            self._asked[node] = (times + 1, self.live.link.clock.now())
        watch = DeliveryEvents(
            waiting=lambda of, seconds: self.listener.waiting(
                server_round, "register", [f"node {n}" for n in of], seconds
            )
        )
        probe = messages.probe(self.run_id, 0, self.task.name, len(nodes))
        replies = exchange(
            self.live,
            messages.register(self.run_id, self.config, nodes, deadline),
            deadline,
            watch,
            None if self.live.link.direct else probe,
        ).replies
        before = self.journal.sites()
        secure = self.config.secure_aggregation.enabled
        federated = self.config.data.standardise == "federated" and not secure
        bounds = column_bounds(self.task) if federated else ()
        for node in nodes:
            if node not in replies:
                continue
            result = admit_registration(
                replies[node],
                f"node {node}",
                self.run_id,
                self.config.admission,
                bounds,
                sizes=not secure,
            )
            if isinstance(result, Registration) and self.seats is not None:
                result = admit_node(result, node, self.seats())
            if isinstance(result, Registration):
                result = admit_again(result, before, self.admitted)
            if isinstance(result, Rejection):
                self._refuse(node, result)
                continue
            self.admitted[result.site] = (node, result)

    def _refuse(self, node: int, rejection: Rejection) -> None:
        self.refused[node] = rejection
        _log.warning("%s refused: FE-%d %s", rejection.site, rejection.code, rejection.reason)

    def _weigh(self, new: Mapping[str, object]) -> None:
        """Refuse those of the new sites that would outweigh the others."""
        before = {**self.journal.sites(), **{s: 0 for s in self.admitted if s not in new}}
        found = dominant(self.admitted, before, self.config.admission.max_size_ratio)
        for site, rejection in found.items():
            self._refuse(self.admitted.pop(site)[0], rejection)

    def _write_down(self, of: Mapping[str, tuple[int, Registration]]) -> dict[str, Member]:
        for site, (_, r) in sorted(of.items()):
            self.journal.add_site(site, r.train_examples, r.test_examples)
        return {m.site: m for m in self.members() if m.site in of}

    def _require(self, members: Mapping[str, Member]) -> None:
        config = self.config.round
        nameless = "; ".join(f"{r.site}: {r.reason}" for r in self._nameless())
        if missing := sorted(set(config.require_sites) - set(members)):
            known = "; ".join(f"no {site} ({self.known_of(site)})" for site in missing)
            raise RunError(
                502,
                _cut(f"round.require-sites: must be registered, got {known}; {nameless}", 800),
            )
        if len(members) < config.min_sites:
            why = "; ".join(
                f"{r.site}: {r.reason}" for r in (*self.refused.values(), *self._silent())
            )
            raise RunError(
                501,
                _cut(f"sites: must be at least {config.min_sites}, got {len(members)}: {why}", 800),
            )

    def _nameless(self) -> list[Rejection]:
        """Nodes of which no site's name is known; a missing site may be one of them."""
        return [r for r in (*self.refused.values(), *self._silent()) if r.site.startswith("node ")]

    def members(self) -> list[Member]:
        """Who is registered, sorted by site."""
        return [
            Member(site, node, r.train_examples, r.test_examples)
            for site, (node, r) in sorted(self.admitted.items())
        ]

    def statistics(self) -> list[Statistics]:
        """What the sites said of their features, in their names' order; nothing where no task asks, or under masks."""
        found = (r.statistics for _, (_, r) in sorted(self.admitted.items()))
        return [part for part in found if part is not None]


def _cut(text: str, longest: int) -> str:
    """A list of reasons without what hangs at its end where it is empty, cut between words where it is too long."""
    return textwrap.shorten(text.rstrip(":; "), longest, placeholder=" …")
