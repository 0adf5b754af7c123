"""How the sites are asked about the final model: in clear or under masks, with noise or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, ConfigRecordValues, Message

from fedge.server.admission.validation_result import Evaluation, Expected, Verdict
from fedge.server.aggregation import privacy_cost
from fedge.server.participants import messages as requests
from fedge.server.participants.availability import Availability
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.members import Member
from fedge.server.runs.journal import Line
from fedge.server.secagg.aggregator import Counters, SecureSums
from fedge.server.training.round_record import RoundRecord
from fedge.shared import protocol
from fedge.shared.compile.calibration import Absent
from fedge.shared.config.federation import Config
from fedge.shared.preprocessing.steps import Step
from fedge.shared.privacy.mechanisms import noised_counts
from fedge.shared.privacy.mechanisms.noised_counts import NoisedCounts
from fedge.shared.secagg.transcript import Purpose
from fedge.shared.wire.tensors import NDArrays


@dataclass(frozen=True)
class Model:
    """What the sites are asked about.

    Attributes:
        server_round: the last.
        arrays: the model.
        graph: as it is exported, with its SHA-256 and the tensors whose ranges are asked for.
        present: whom to ask.
    """

    server_round: int
    arrays: NDArrays
    graph: bytes
    sha256: str
    tensors: tuple[str, ...]
    present: list[Member]


@dataclass
class Asked:
    """One exchange.

    Attributes:
        purpose: of it.
        kind: message type.
        names: of the counters without noise.
        order: of those with noise, as a reply lists them.
        noised: how they get noise; None where they have none.
        most: examples that a site may speak of.
        more: keys of its requests.
        absent: sites that are not in it.
    """

    purpose: Purpose
    kind: str
    names: tuple[str, ...]
    order: tuple[str, ...]
    noised: NoisedCounts | None
    most: Callable[[Member], int]
    more: Mapping[str, ConfigRecordValues] = field(default_factory=dict)
    absent: list[Absent] = field(default_factory=list)


@dataclass(frozen=True)
class Exchanges:
    """Whom a run asks, and how.

    Attributes:
        config, run_id: of the run.
        talk: with the sites.
        attendance: who is there.
        steps: the run's preprocessing.
        sums: where counts are masked.
        tally: of bytes, and of what the sites say of their ledgers.
    """

    config: Config
    run_id: str
    talk: MemberExchange
    attendance: Availability
    steps: tuple[Step, ...]
    sums: SecureSums | None
    tally: RoundRecord = field(default_factory=lambda: RoundRecord([], []))

    @property
    def mode(self) -> str:
        """As calibration.json has it."""
        if self.config.privacy.metrics == "noised":
            return "noised"
        return "exact" if self.sums is None else "histogram"

    def present(self, last: Line) -> list[Member]:
        """As an evaluation: what sent a bad update is not asked for figures either."""
        out = {r["site"] for r in last["rejected"] if r["outcome"] in ("rejected", "stale")}
        out = (out - set(last["trained"])) | self.attendance.gone()
        return [m for m in self.attendance.members.values() if m.site not in out]

    def noise(
        self, names: tuple[str, ...], sensitivity: float | None = None
    ) -> NoisedCounts | None:
        """How each site's counters get noise; None where they have none."""
        if self.sums is not None:
            return self.sums.noised_counts(names, sensitivity)
        return noised_counts.plan(self.config.privacy, names, 1, sensitivity)

    def told(self, of: Model, asked: Asked) -> Iterator[tuple[Member, Message, Expected]]:
        """Replies in clear, each with who sent it and what it must look like."""
        members = [m for m in of.present if asked.most(m)]
        messages = self._messages(of, asked, members, None)
        result = self.talk.ask(of.server_round, asked.purpose, members, messages)
        self.tally.count(result, members, self.config.round.deadline)
        expected = Expected(
            self.run_id,
            of.server_round,
            {},
            self.config.admission,
            counters=asked.names if asked.noised is None else asked.order,
            noised=asked.noised,
        )
        for member in members:
            if member.node_id in result.replies:
                yield member, result.replies[member.node_id], expected

    def take(self, verdict: Verdict) -> None:
        """Note what the gate says of a reply."""
        self.tally.take(verdict)
        if isinstance(verdict.evaluation, Evaluation):
            self.tally.told(verdict.evaluation)

    def summed(
        self, sums: SecureSums, of: Model, asked: Asked
    ) -> tuple[dict[str, float] | None, tuple[str, ...], str]:
        """Counters under masks, the sites that are in them, and why there are none."""

        def compose(some: list[Member], secure: ConfigRecord) -> list[Message]:
            return self._messages(of, asked, some, secure)

        counters = Counters(asked.purpose, asked.names, asked.noised)
        counted, outcome = sums.evaluate(of.server_round, of.present, compose, counters)
        self.tally.add(outcome.sent, outcome.received, outcome.rejections(of.present))
        if asked.noised is not None:
            self.tally.ledgers |= {s: d for s, d in outcome.ledgers.items() if s in outcome.sites}
        sites = tuple(outcome.sites) if counted is not None else ()
        return counted, sites, "; ".join(outcome.failed)

    def releases(self, purpose: Purpose, server_round: int) -> int:
        """How often each site was charged for an exchange at most, by coordinators before this one too."""
        # In clear the same request has the same answer.
        return 1 if self.sums is None else self.sums.attempts(purpose, server_round)

    def charged(self, last: Line) -> Line:
        """The last round's line with what the sites have said of their ledgers so far; the rest is the round's own."""
        told = self.tally.completed(last, 0.0)
        return last | {key: told[key] for key in ("privacy", "privacy_ledgers") if key in told}

    def spent(self, last: Line, releases: int) -> Line:
        """Epsilon of the run with so many releases more, where it is the server that reckons it."""
        privacy, run = self.config.privacy, self.config.run
        if privacy.metrics != "noised":
            return {}
        if privacy_cost.KEY in last:
            before = last[privacy_cost.KEY]
            return {privacy_cost.KEY: privacy_cost.masked_spent(privacy, before, 0, releases)}
        if "central" in last:
            evaluations = -(-run.rounds // run.evaluate_every) + releases
            spent = privacy_cost.central_spent(privacy, last["round"], evaluations)
            return {"central": {**last["central"], "epsilon": spent}}
        return {}

    def absent(self, asked: Asked, of: str) -> tuple[Absent, ...]:
        """Who is not in the figures; the tally begins anew for the next exchange."""
        told = [Absent(r.site, of, r.code, r.reason) for r in self.tally.rejections]
        self.tally.rejections = []
        return (*told, *asked.absent)

    def _messages(
        self, of: Model, asked: Asked, some: list[Member], secure: ConfigRecord | None
    ) -> list[Message]:
        common: dict[str, Any] = {
            **requests.settings(self.config, self.run_id, of.server_round, self.steps, len(some)),
            protocol.CALIBRATION: self.config.calibration.model_dump_json(by_alias=True),
            protocol.GRAPH: of.sha256,
            **asked.more,
        }
        return requests.evaluate(of.arrays, common, some, self.config, secure, asked.kind)
