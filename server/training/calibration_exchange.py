"""Exchanges with the sites about the final model: with or without secure aggregation and noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, ConfigRecordValues, Message

from fedge.server.admission.validation_result import Evaluation, Expected, Verdict
from fedge.server.aggregation import privacy_cost
from fedge.server.participants import request_content as requests
from fedge.server.participants.availability import Availability
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.members import Member
from fedge.server.runs.journal import Line
from fedge.server.secagg.secure_sums import Counters, SecureSums
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
    """The final model, about which the sites are asked.

    Attributes:
        server_round: number of the last round.
        arrays: tensor name -> the model's weights.
        graph: the exported ONNX graph.
        sha256: its digest (hex).
        tensors: names of its tensors whose ranges are requested.
        present: the available members.
    """

    server_round: int
    arrays: NDArrays
    graph: bytes
    sha256: str
    tensors: tuple[str, ...]
    present: list[Member]


@dataclass
class CalibrationRequest:
    """One request to the sites about the final model.

    Attributes:
        purpose: purpose of a secure sum, and phase of the exchange.
        kind: message type.
        names: names of the counters without noise.
        order: names of the counters with noise, in the order of a reply's list.
        noised: the noise on the counters; None where they have none.
        max_examples: gives the maximum number of examples that a member may report.
        more: further values of the ``config`` record.
        absent: sites that are not in the result.
    """

    purpose: Purpose
    kind: str
    names: tuple[str, ...]
    order: tuple[str, ...]
    noised: NoisedCounts | None
    max_examples: Callable[[Member], int]
    more: Mapping[str, ConfigRecordValues] = field(default_factory=dict)
    absent: list[Absent] = field(default_factory=list)


@dataclass(frozen=True)
class Exchanges:
    """Asks the sites of a run about its final model.

    Attributes:
        config, run_id: of the run.
        member_exchange: sends requests to the sites.
        availability: which sites are available.
        steps: the run's preprocessing.
        sums: sums the counters under secure aggregation; None without it.
        record: collects bytes, rejections, and what the sites report about their ledgers.
    """

    config: Config
    run_id: str
    member_exchange: MemberExchange
    availability: Availability
    steps: tuple[Step, ...]
    sums: SecureSums | None
    record: RoundRecord = field(default_factory=lambda: RoundRecord([], []))

    @property
    def mode(self) -> str:
        """The ``mode`` in calibration.json: "exact", "histogram" or "noised"."""
        if self.config.privacy.metrics == "noised":
            return "noised"
        return "exact" if self.sums is None else "histogram"

    def present(self, last: Line) -> list[Member]:
        """The members to ask: as in an evaluation, a site that sent a bad update is left out.

        Args:
            last: line of the last round.
        """
        excluded = {r["site"] for r in last["rejected"] if r["outcome"] in ("rejected", "stale")}
        excluded = (excluded - set(last["trained"])) | self.availability.dropped_out()
        return [m for m in self.availability.members.values() if m.site not in excluded]

    def noise(
        self, names: tuple[str, ...], sensitivity: float | None = None
    ) -> NoisedCounts | None:
        """The noise that each site adds to its counters; None where they have none.

        Args:
            names: names of the counters.
            sensitivity: L2 sensitivity of the counters to one example or site; the default of counts unless given.
        """
        if self.sums is not None:
            return self.sums.noised_counts(names, sensitivity)
        return noised_counts.plan(self.config.privacy, names, 1, sensitivity)

    def replies(
        self, model: Model, request: CalibrationRequest
    ) -> Iterator[tuple[Member, Message, Expected]]:
        """Send a request without secure aggregation; yield each reply with its sender and what it must look like."""
        members = [m for m in model.present if request.max_examples(m)]
        messages = self._messages(model, request, members, None)
        result = self.member_exchange.ask(model.server_round, request.purpose, members, messages)
        self.record.count(result, members, self.config.round.deadline)
        expected = Expected(
            self.run_id,
            model.server_round,
            {},
            self.config.admission,
            counters=request.names if request.noised is None else request.order,
            noised=request.noised,
            delta=self.config.privacy.delta,
        )
        for member in members:
            if member.node_id in result.replies:
                yield member, result.replies[member.node_id], expected

    def take(self, verdict: Verdict) -> None:
        """Add the outcome of a reply's validation to the record."""
        self.record.take(verdict)
        if isinstance(verdict.evaluation, Evaluation):
            self.record.add_evaluation(verdict.evaluation)

    def summed(
        self, sums: SecureSums, model: Model, request: CalibrationRequest
    ) -> tuple[dict[str, float] | None, tuple[str, ...], str]:
        """Sum counters under secure aggregation.

        Returns:
            The summed counters by name, None where there are none; the sites that are in them; and why there are none.
        """

        def compose(members: list[Member], secure: ConfigRecord) -> list[Message]:
            return self._messages(model, request, members, secure)

        counters = Counters(request.purpose, request.names, request.noised)
        counted, outcome = sums.evaluate(model.server_round, model.present, compose, counters)
        self.record.add(outcome.sent, outcome.received, outcome.rejections(model.present))
        if request.noised is not None:
            self.record.ledgers |= {s: d for s, d in outcome.ledgers.items() if s in outcome.sites}
        sites = tuple(outcome.sites) if counted is not None else ()
        return counted, sites, "; ".join(outcome.failed)

    def releases(self, purpose: Purpose, server_round: int) -> int:
        """The maximum number of times that each site was charged for a request, earlier coordinators included."""
        # Without secure aggregation the same request has the same reply.
        return 1 if self.sums is None else self.sums.attempts(purpose, server_round)

    def charged(self, last: Line) -> Line:
        """The last round's line with what the sites have reported about their ledgers since; the rest is unchanged."""
        line = self.record.completed(last, 0.0)
        return last | {key: line[key] for key in ("privacy", "privacy_ledgers") if key in line}

    def spent(self, last: Line, releases: int) -> Line:
        """The keys of the last round's line with the run's epsilon, where the server accounts for it.

        Args:
            last: line of the last round.
            releases: number of releases in addition to the line's.
        """
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

    def absent(self, request: CalibrationRequest, subject: str) -> tuple[Absent, ...]:
        """The sites that are not in the result; the record's rejections are cleared for the next exchange.

        Args:
            request: the request of the exchange.
            subject: what the sites are absent from: ranges or candidates, as calibration.json names them.
        """
        rejected = [Absent(r.site, subject, r.code, r.reason) for r in self.record.rejections]
        self.record.rejections = []
        return (*rejected, *request.absent)

    def _messages(
        self,
        model: Model,
        request: CalibrationRequest,
        members: list[Member],
        secure: ConfigRecord | None,
    ) -> list[Message]:
        common: dict[str, Any] = {
            **requests.settings(
                self.config, self.run_id, model.server_round, self.steps, len(members)
            ),
            protocol.CALIBRATION: self.config.calibration.model_dump_json(by_alias=True),
            protocol.GRAPH: model.sha256,
            **request.more,
        }
        return requests.evaluate(model.arrays, common, members, self.config, secure, request.kind)
