"""The evaluation of a round's model at the sites that are there: what they count, with or without masks and noise."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message

from fedge.server.admission.validation import admit_evaluate
from fedge.server.admission.validation_result import Evaluation, Expected
from fedge.server.participants import messages as requests
from fedge.server.participants.availability import Availability
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.members import Member
from fedge.server.secagg.aggregator import SecureSums
from fedge.server.training.metrics import masked_summary, summary
from fedge.server.training.round_record import RoundRecord
from fedge.shared.config.federation import Config
from fedge.shared.preprocessing.steps import Step
from fedge.shared.privacy.mechanisms import noised_counts
from fedge.shared.tasks.task import Task
from fedge.shared.wire.tensors import NDArrays

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Model:
    """What is evaluated."""

    server_round: int
    arrays: NDArrays


@dataclass(frozen=True)
class Evaluator:
    """Whom a run asks for figures, and how.

    Attributes:
        config, task, run_id: of the run.
        talk: with the sites.
        attendance: who is there.
        steps: the run's preprocessing.
        sums: where counts are masked.
    """

    config: Config
    task: Task
    run_id: str
    talk: MemberExchange
    attendance: Availability
    steps: tuple[Step, ...]
    sums: SecureSums | None

    def measure(
        self, server_round: int, arrays: NDArrays, trained: set[str], tally: RoundRecord
    ) -> None:
        """Evaluate a round's model where it is due and may be told, into the round's tally.

        Args:
            server_round: whose model it is.
            arrays: the model.
            trained: sites whose update counted.
            tally: of the round.
        """
        every, privacy = self.config.run.evaluate_every, self.config.privacy
        if privacy.mechanism != "off" and privacy.metrics == "off":
            # Exact counts over held-out examples would be a release without noise.
            tally.metrics |= {"per_site": {}, "site_mean": {}, "pooled": {}}
        elif server_round % every == 0 or server_round == self.config.run.rounds:
            self._evaluate(_Model(server_round, arrays), trained, tally)

    def _evaluate(self, of: _Model, trained: set[str], tally: RoundRecord) -> None:
        # Quarantine for the round: what sent a bad update is not asked for figures either.
        out = {r.site for r in tally.rejections if r.outcome in ("rejected", "stale")} - trained
        out |= self.attendance.gone()
        present = [m for m in self.attendance.members.values() if m.site not in out]
        if self.sums is not None:
            self._evaluate_securely(self.sums, of, present, tally)
            return
        asked = [m for m in present if m.test_examples]
        common = requests.settings(
            self.config, self.run_id, of.server_round, self.steps, len(asked)
        )
        messages = requests.evaluate(of.arrays, common, asked, self.config)
        noised = noised_counts.plan(self.config.privacy, self.task.counter_names)
        counters = self.task.counter_names if noised is None else noised.told
        expected = Expected(
            self.run_id,
            of.server_round,
            {},
            self.config.admission,
            counters=counters,
            noised=noised,
        )
        result = self.talk.ask(of.server_round, "evaluate", asked, messages)
        tally.count(result, asked, self.config.round.deadline)
        admitted: dict[str, dict[str, float]] = {}
        for member in asked:
            if member.node_id in result.replies:
                verdict = admit_evaluate(
                    result.replies[member.node_id], member.site, member.test_examples, expected
                )
                tally.take(verdict)
                if isinstance(verdict.evaluation, Evaluation):
                    admitted[member.site] = verdict.evaluation.counters
                    tally.told(verdict.evaluation)
        tally.metrics |= summary(self.task.metrics, admitted, noise=noised)

    def _evaluate_securely(
        self, sums: SecureSums, of: _Model, asked: list[Member], tally: RoundRecord
    ) -> None:
        """Only the pooled metrics: no site's own leaves it."""

        def compose(some: list[Member], secure: ConfigRecord) -> list[Message]:
            common = requests.settings(
                self.config, self.run_id, of.server_round, self.steps, len(some)
            )
            return requests.evaluate(of.arrays, common, some, self.config, secure)

        counted, outcome = sums.evaluate(of.server_round, asked, compose)
        tally.add(outcome.sent, outcome.received, outcome.rejections(asked))
        facts = {"sites": len(outcome.sites), "attempts": outcome.attempts, "lost": outcome.lost}
        reason = "; ".join(outcome.failed)[:400] if counted is None else None
        tally.secure = {**(tally.secure or {}), "evaluation": {**facts, "reason": reason}}
        if reason:
            _log.warning("round %d is not evaluated: %s", of.server_round, reason)
        noised = sums.noised_counts()
        if noised is not None:
            tally.ledgers |= {s: d for s, d in outcome.ledgers.items() if s in outcome.sites}
        tally.metrics |= masked_summary(
            self.task.metrics, counted or {}, noised, len(outcome.sites)
        )
