"""Registration of nodes as sites, once a run; the number of examples that a site registers is fixed for the run."""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedge.server.admission.validation_result import Registration, Rejection
from fedge.server.participants import request_content
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
#: How often the pause until a node that timed out is asked again doubles, at most.
_MAX_PAUSE_DOUBLINGS = 4
#: How often the time for its reply doubles, at most; the round waits for it.
_MAX_DEADLINE_DOUBLINGS = 2


@dataclass
class Registry:
    """The registry of one Flower run.

    Attributes:
        node_status: connection status of the nodes, with the client of Flower's grid.
        config: configuration of the run.
        task: task of the run.
        run_id: fedge's id of the run.
        journal: journal of the run.
        listener: gets the progress.
        admitted_nodes: gives site -> id of the node that the server has admitted for it, as text; None where sites
            are not admitted by key (simulation).
        admitted: site -> (node id, registration).
        refused: node id -> why it may not take part.
    """

    node_status: NodeStatus
    config: Config
    task: Task
    run_id: str
    journal: Journal
    listener: Listener
    admitted_nodes: Callable[[], Mapping[str, str]] | None = None
    admitted: dict[str, tuple[int, Registration]] = field(default_factory=dict)
    refused: dict[int, Rejection] = field(default_factory=dict)
    _requests: dict[int, tuple[int, float]] = field(default_factory=dict)
    _reported_at: float = 0.0

    def take(self, flower_run_id: int) -> tuple[dict[str, Member], list[Rejection]]:
        """Register every node that the grid lists, and wait for as many as the configuration names.

        Args:
            flower_run_id: id of the Flower run, for the log.

        Returns:
            Members by site, in name order, and the rejected registrations.

        Raises:
            RunError: 501, fewer than ``round.min-sites`` before the deadline, or the SuperLink does not answer;
                502, a required site is missing.
        """
        config, clock = self.config, self.node_status.grid_client.clock
        wanted = (
            config.sites.count if config.data.partition != "natural" else config.round.min_sites
        )
        needed = max(wanted, config.round.min_sites)
        started = self._reported_at = clock.now()
        deadline = started + config.round.deadline
        bound = min(config.round.deadline, self.node_status.grid_client.timeouts.registration)
        while True:
            new = self._new(deadline, "connect", started)
            left = deadline - clock.now()
            if new and left > 0:
                self._register(0, new, min(left, bound))
            left = deadline - clock.now()
            if len(self.admitted) >= needed or left <= 0:
                break
            if len(self.admitted) + len(self.refused) >= needed:
                # All expected nodes have replied; a refused one is not admitted later either.
                break
            enough = len(self.admitted) >= config.round.min_sites
            if enough and len(self._members() | set(self._requests)) >= needed:
                # A connected node that does not reply may join later.
                break
            self._report_waiting(0, "connect", started)
            clock.sleep(min(_PAUSE, left))
        self._refuse_dominant(self.admitted)
        members = self._add_to_journal(self.admitted)
        _log.info(
            "Flower run %s: %d sites registered, %d refused",
            flower_run_id,
            len(members),
            len(self.refused),
        )
        self._require(members)
        return members, [*self.refused.values(), *self._timed_out()]

    def join(self, server_round: int) -> tuple[dict[str, Member], list[Rejection]]:
        """Register nodes that have connected since, at most once a minute, of those that were listed last.

        Nodes that did not reply, or whose worker failed, are asked again after pauses that double.

        Args:
            server_round: the round that is about to begin.

        Returns:
            Members that joined, by site, and the new rejections.
        """
        grid_client = self.node_status.grid_client
        timeouts, now = grid_client.timeouts, grid_client.clock.now()
        last = max((at for _, at in self._requests.values()), default=-math.inf)
        new = [
            node
            for node in sorted(self.node_status.listed - self._members())
            if not self._is_final(node)
            and now - self._requests.get(node, (0, -math.inf))[1] >= self._pause(node)
        ]
        if not new or now - last < timeouts.joining_again:
            return {}, []
        before, refused = set(self.admitted), dict(self.refused)
        for node in new:
            self.refused.pop(node, None)
        # On a slow connection a reply takes a minute: a node that timed out has more time with each attempt.
        times = max(self._requests.get(node, (0, 0.0))[0] for node in new)
        bound = timeouts.joining * 2.0 ** min(times, _MAX_DEADLINE_DOUBLINGS)
        self._register(server_round, new, min(bound, self.config.round.deadline))
        joined = {site: self.admitted[site] for site in set(self.admitted) - before}
        self._refuse_dominant(joined)
        members = self._add_to_journal({s: v for s, v in joined.items() if s in self.admitted})
        new_rejections = [r for node, r in self.refused.items() if refused.get(node) != r]
        _log.info("round %d: %d sites joined", server_round, len(members))
        return members, new_rejections

    def missing_reason(self, site: str) -> str:
        """Explain why a site is not among the members."""
        for rejection in self.refused.values():
            if rejection.site == site:
                return f"refused, FE-{rejection.code} {rejection.reason}"
        if site in self.journal.sites():
            return "not registered since the run was resumed"
        return "never registered"

    def _members(self) -> set[int]:
        return {node for node, _ in self.admitted.values()}

    def _is_final(self, node: int) -> bool:
        """Whether a node is refused for the whole run; one that failed may recover."""
        return node in self.refused and self.refused[node].outcome != "error"

    def _pause(self, node: int) -> float:
        times = self._requests.get(node, (0, 0.0))[0]
        doublings = min(max(times - 1, 0), _MAX_PAUSE_DOUBLINGS)
        return self.node_status.grid_client.timeouts.joining_again * 2.0**doublings

    def _new(self, until: float, phase: str, started: float) -> list[int]:
        self.node_status.look((), until, lambda: self._report_waiting(0, phase, started))
        return sorted(self.node_status.listed - self._members() - set(self.refused))

    def _report_waiting(self, server_round: int, phase: str, started: float) -> None:
        grid_client = self.node_status.grid_client
        now = grid_client.clock.now()
        if now - self._reported_at >= grid_client.timeouts.reporting:
            self._reported_at = now
            if grid_client.failing_since is not None:
                phase = "superlink"
            awaited = set(self.config.round.require_sites) | set(self.journal.sites())
            self.listener.waiting(
                server_round, phase, sorted(awaited - set(self.admitted)), now - started
            )

    def _timed_out(self) -> list[Rejection]:
        return [
            Rejection(f"node {node}", 409, "absent", "connected, but no answer to the registration")
            for node in sorted(set(self._requests) - self._members() - set(self.refused))
        ]

    def _register(self, server_round: int, nodes: Sequence[int], deadline: float) -> None:
        for node in nodes:
            times, _ = self._requests.get(node, (0, 0.0))
            self._requests[node] = (times + 1, self.node_status.grid_client.clock.now())
        events = DeliveryEvents(
            waiting=lambda waiting, seconds: self.listener.waiting(
                server_round, "register", [f"node {n}" for n in waiting], seconds
            )
        )
        probe = request_content.probe(self.run_id, 0, self.task.name, len(nodes))
        replies = exchange(
            self.node_status,
            request_content.register(self.run_id, self.config, nodes, deadline),
            deadline,
            events,
            None if self.node_status.grid_client.direct else probe,
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
            if isinstance(result, Registration) and self.admitted_nodes is not None:
                result = admit_node(result, node, self.admitted_nodes())
            if isinstance(result, Registration):
                result = admit_again(result, before, self.admitted)
            if isinstance(result, Rejection):
                self._refuse(node, result)
                continue
            self.admitted[result.site] = (node, result)

    def _refuse(self, node: int, rejection: Rejection) -> None:
        self.refused[node] = rejection
        _log.warning("%s refused: FE-%d %s", rejection.site, rejection.code, rejection.reason)

    def _refuse_dominant(self, new: Mapping[str, object]) -> None:
        """Refuse those of the new sites that would outweigh the others."""
        before = {**self.journal.sites(), **{s: 0 for s in self.admitted if s not in new}}
        rejections = dominant(self.admitted, before, self.config.admission.max_size_ratio)
        for site, rejection in rejections.items():
            self._refuse(self.admitted.pop(site)[0], rejection)

    def _add_to_journal(
        self, admitted: Mapping[str, tuple[int, Registration]]
    ) -> dict[str, Member]:
        for site, (_, r) in sorted(admitted.items()):
            self.journal.add_site(site, r.train_examples, r.test_examples)
        return {m.site: m for m in self.members() if m.site in admitted}

    def _require(self, members: Mapping[str, Member]) -> None:
        config = self.config.round
        nameless = "; ".join(f"{r.site}: {r.reason}" for r in self._nameless())
        if missing := sorted(set(config.require_sites) - set(members)):
            reasons = "; ".join(f"no {site} ({self.missing_reason(site)})" for site in missing)
            raise RunError(
                502,
                _cut(f"round.require-sites: must be registered, got {reasons}; {nameless}", 800),
            )
        if len(members) < config.min_sites:
            reasons = "; ".join(
                f"{r.site}: {r.reason}" for r in (*self.refused.values(), *self._timed_out())
            )
            raise RunError(
                501,
                _cut(
                    f"sites: must be at least {config.min_sites}, got {len(members)}: {reasons}",
                    800,
                ),
            )

    def _nameless(self) -> list[Rejection]:
        """Rejections of nodes whose site's name is not known; a missing site may be one of them."""
        return [
            r for r in (*self.refused.values(), *self._timed_out()) if r.site.startswith("node ")
        ]

    def members(self) -> list[Member]:
        """The registered sites, sorted by name."""
        return [
            Member(site, node, r.train_examples, r.test_examples)
            for site, (node, r) in sorted(self.admitted.items())
        ]

    def statistics(self) -> list[Statistics]:
        """The statistics of the sites' features, in the order of their names.

        Empty where the task fits none, and under secure aggregation.
        """
        registered = (r.statistics for _, (_, r) in sorted(self.admitted.items()))
        return [part for part in registered if part is not None]


def _cut(text: str, max_length: int) -> str:
    """Strip separators from the end of a list of reasons, and cut it between words where it is too long."""
    return textwrap.shorten(text.rstrip(":; "), max_length, placeholder=" …")
