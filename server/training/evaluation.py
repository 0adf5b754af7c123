"""The evaluation of a round's model at the available sites, with or without secure aggregation and noise."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message

from fedge.server.admission.validation import admit_evaluate
from fedge.server.admission.validation_result import Evaluation, Expected
from fedge.server.participants import request_content as requests
from fedge.server.participants.availability import Availability
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.members import Member
from fedge.server.secagg.secure_sums import SecureSums
from fedge.server.training.metrics import secure_summary, summary
from fedge.server.training.round_record import RoundRecord
from fedge.shared.config.federation import Config
from fedge.shared.preprocessing.steps import Step
from fedge.shared.privacy.mechanisms import noised_counts
from fedge.shared.tasks.task import Task
from fedge.shared.wire.tensors import NDArrays

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Model:
    """The model that is evaluated."""

    server_round: int
    arrays: NDArrays


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the models of a run at its sites.

    Attributes:
        config, task, run_id: of the run.
        member_exchange: sends requests to the sites.
        availability: which sites are available.
        steps: the run's preprocessing.
        sums: sums the counters under secure aggregation; None without it.
    """

    config: Config
    task: Task
    run_id: str
    member_exchange: MemberExchange
    availability: Availability
    steps: tuple[Step, ...]
    sums: SecureSums | None

    def measure(
        self, server_round: int, arrays: NDArrays, trained: set[str], record: RoundRecord
    ) -> None:
        """Evaluate a round's model, where that is due and allowed, and add the metrics to the round's record.

        Args:
            server_round: number of the round.
            arrays: tensor name -> the model's weights.
            trained: sites whose update was accepted.
            record: record of the round.
        """
        every, privacy = self.config.run.evaluate_every, self.config.privacy
        if privacy.mechanism != "off" and privacy.metrics == "off":
            # Exact counts over held-out examples would be released without noise.
            record.metrics |= {"per_site": {}, "site_mean": {}, "pooled": {}}
        elif server_round % every == 0 or server_round == self.config.run.rounds:
            self._evaluate(_Model(server_round, arrays), trained, record)

    def _evaluate(self, model: _Model, trained: set[str], record: RoundRecord) -> None:
        # Quarantine for the round: a site that sent a bad update is not asked to evaluate either.
        excluded = {
            r.site for r in record.rejections if r.outcome in ("rejected", "stale")
        } - trained
        excluded |= self.availability.dropped_out()
        present = [m for m in self.availability.members.values() if m.site not in excluded]
        if self.sums is not None:
            self._evaluate_securely(self.sums, model, present, record)
            return
        members = [m for m in present if m.test_examples]
        common = requests.settings(
            self.config, self.run_id, model.server_round, self.steps, len(members)
        )
        messages = requests.evaluate(model.arrays, common, members, self.config)
        noised = noised_counts.plan(self.config.privacy, self.task.counter_names)
        counters = self.task.counter_names if noised is None else noised.reported
        expected = Expected(
            self.run_id,
            model.server_round,
            {},
            self.config.admission,
            counters=counters,
            noised=noised,
            delta=self.config.privacy.delta,
        )
        result = self.member_exchange.ask(model.server_round, "evaluate", members, messages)
        record.count(result, members, self.config.round.deadline)
        admitted: dict[str, dict[str, float]] = {}
        for member in members:
            if member.node_id in result.replies:
                verdict = admit_evaluate(
                    result.replies[member.node_id], member.site, member.test_examples, expected
                )
                record.take(verdict)
                if isinstance(verdict.evaluation, Evaluation):
                    admitted[member.site] = verdict.evaluation.counters
                    record.add_evaluation(verdict.evaluation)
        record.metrics |= summary(self.task.metrics, admitted, noise=noised)

    def _evaluate_securely(
        self, sums: SecureSums, model: _Model, members: list[Member], record: RoundRecord
    ) -> None:
        """Evaluate under secure aggregation: only pooled metrics, as no site reports its own."""

        def compose(invited: list[Member], secure: ConfigRecord) -> list[Message]:
            common = requests.settings(
                self.config, self.run_id, model.server_round, self.steps, len(invited)
            )
            return requests.evaluate(model.arrays, common, invited, self.config, secure)

        counted, outcome = sums.evaluate(model.server_round, members, compose)
        record.add(outcome.sent, outcome.received, outcome.rejections(members))
        facts = {"sites": len(outcome.sites), "attempts": outcome.attempts, "lost": outcome.lost}
        reason = "; ".join(outcome.failed)[:400] if counted is None else None
        record.secure = {**(record.secure or {}), "evaluation": {**facts, "reason": reason}}
        if reason:
            _log.warning("round %d is not evaluated: %s", model.server_round, reason)
        noised = sums.noised_counts()
        if noised is not None:
            record.ledgers |= {s: d for s, d in outcome.ledgers.items() if s in outcome.sites}
        record.metrics |= secure_summary(
            self.task.metrics, counted or {}, noised, len(outcome.sites)
        )
