"""One round after the other: invite, collect until the deadline, admit, aggregate, evaluate, commit.

Everything random is a function of (seed, round, site), so a redone round is the same round. Noise that the server adds
is not: a redone round samples new noise, so nothing of a round may leave the server before its commit, and its model is
evaluated after that.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import strategy as flower

from fedge.server.admission.validation import admit_losses, admit_train
from fedge.server.admission.validation_result import Expected
from fedge.server.aggregation import privacy_cost, strategies
from fedge.server.aggregation import updates as site_updates
from fedge.server.aggregation.aggregate import aggregate
from fedge.server.aggregation.central_noise import CentralNoise
from fedge.server.aggregation.privacy_cost import is_secret_sample
from fedge.server.aggregation.updates import RoundResult, Singles, Update
from fedge.server.participants import request_content as requests
from fedge.server.participants import selection
from fedge.server.participants.availability import Availability
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.members import Member
from fedge.server.runs import checkpoints
from fedge.server.runs import results as run_results
from fedge.server.runs.checkpoints import checkpoints_to_keep
from fedge.server.runs.directory import RunDirectory
from fedge.server.runs.journal import Journal, Line
from fedge.server.runs.listener import Listener
from fedge.server.secagg.secure_sums import SecureSums
from fedge.server.training.calibration import Calibrator
from fedge.server.training.calibration_exchange import Exchanges
from fedge.server.training.evaluation import Evaluator
from fedge.server.training.round_record import RoundRecord
from fedge.shared import protocol
from fedge.shared.compile import calibration
from fedge.shared.compile.calibration import Calibration
from fedge.shared.config.federation import Config
from fedge.shared.errors import RunError
from fedge.shared.failpoints import reach
from fedge.shared.preprocessing.steps import Step
from fedge.shared.privacy.mechanisms import local
from fedge.shared.tasks.task import Task
from fedge.shared.wire.tensors import NDArrays, digest

_log = logging.getLogger(__name__)


@dataclass
class Loop:
    """A run in progress.

    ``strategy`` and ``arrays`` are the state after round ``done``; ``sums`` is set under secure aggregation,
    ``central`` where the server adds noise. ``accepted_rounds`` holds the last round in which a site's update was
    accepted, ``update_counts`` the number of such rounds; ``skipped`` counts rounds in a row without a model.
    """

    directory: RunDirectory
    config: Config
    task: Task
    journal: Journal
    run_id: str
    listener: Listener
    member_exchange: MemberExchange
    availability: Availability
    strategy: flower.FedAvg
    steps: tuple[Step, ...]
    arrays: NDArrays
    done: int
    sums: SecureSums | None = None
    central: CentralNoise | None = None
    accepted_rounds: dict[str, int] = field(default_factory=dict)
    update_counts: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    consecutive_failed_rounds: int = 0
    spent: dict[str, float | None] = field(default_factory=dict)

    def remember(self, lines: list[Line]) -> None:
        """Restore the counts of accepted updates and of skipped rounds from the lines of committed rounds."""
        for line in lines:
            self._note(line)

    def _note(self, line: Line) -> None:
        self.spent = line.get(privacy_cost.KEY, self.spent)
        if line["outcome"] == "committed":
            self.update_counts.update(line["trained"])
            self.accepted_rounds |= dict.fromkeys(line["trained"], line["round"])
            self.skipped = 0
            if line["trained"]:
                self.consecutive_failed_rounds = 0
            elif line["invited"]:
                self.consecutive_failed_rounds += 1
        else:
            self.skipped += 1

    def play(self, server_round: int) -> None:
        """Play one round and commit it.

        Raises:
            RunError: 502, a required site's update is missing (nothing is committed); 503, too many rounds in a
                row without a model (the last of them is committed).
        """
        started = time.monotonic()
        present, rejections = self.availability.open(server_round, self._min_sites)
        if isinstance(self.strategy, strategies.Scaffold):
            self.strategy.num_sites = len(self.journal.sites())
        names = self._cohort(present, server_round)
        record = RoundRecord(invited=names, rejections=rejections)
        result: RoundResult
        if self.sums is not None:
            result, reason = self._train_securely(self.sums, server_round, names, record)
            reason = reason or self._aggregate(server_round, result)
        elif self.central is not None:
            result, reason = self._train_for_noise(
                self.central, server_round, list(present.values()), record
            )
        else:
            updates = self._train(server_round, names, record)
            result, reason = Singles(updates), self._too_few("updates", len(updates))
            reason = reason or self._aggregate(server_round, result)
        if self.central is None:
            self._measure(server_round, set(site_updates.sites(result)), record)
        record.masked_epsilon = self._secure_epsilon(server_round)
        line = record.line(
            server_round, reason, result, digest(self.arrays), time.monotonic() - started
        )
        self._commit(server_round, line)
        if self.central is not None:
            self._measure(server_round, set(line["trained"]), record)
            line = record.completed(line, time.monotonic() - started)
            self.journal.amend(server_round, line)
        if self.sums is not None:
            self.sums.settled()
        self.done = server_round
        self._note(line)
        self.directory.append_line(line)
        kept = checkpoints_to_keep(self.config.privacy, self.config.run.rounds, server_round)
        checkpoints.prune(self.directory.checkpoints, server_round, kept)
        run_results.write_run(self.directory, self.journal, self.config, self.update_counts)
        self.listener.round(line)
        failed = self.consecutive_failed_rounds
        if failed >= self.config.round.max_skipped:
            raise RunError(
                503,
                f"round {server_round}: must have an update among the noise, got none that counts in the {failed}."
                f" round in a row in which sites were asked ({_first(line)})",
            )
        if self.skipped >= self.config.round.max_skipped:
            raise RunError(
                503,
                f"round {server_round}: must make a model, got the {self.skipped}. in a row without one ({reason})",
            )

    def catch_up(self) -> None:
        """Evaluate the last round where that is missing: the coordinator was killed after the commit."""
        lines = self.journal.lines()
        if self.central is None or not lines or "pooled" in lines[-1]["metrics"]:
            return
        record, line = RoundRecord.from_line(lines[-1]), lines[-1]
        self._measure(self.done, set(line["trained"]), record)
        if record.metrics:
            self.journal.amend(self.done, record.completed(line, line["seconds"]))
            self.directory.write_lines(self.journal.lines())

    def calibrate(self) -> None:
        """Calibrate the final model at the sites, where that is configured and not done yet."""
        lines = self.journal.lines()
        if not self.config.calibration.enabled or self.journal.calibration() is not None:
            return
        if not any(line["outcome"] == "committed" for line in lines):
            return
        started = time.monotonic()
        exchanges = Exchanges(
            self.config, self.run_id, self.member_exchange, self.availability, self.steps, self.sums
        )
        text = self.journal.ranges()
        kept_ranges = None if text is None else calibration.parse(text.encode())

        def keep(ranges: Calibration) -> None:
            line = exchanges.charged(lines[-1])
            self.journal.keep_ranges(calibration.dump(ranges).decode(), self.done, line)
            if self.sums is not None:
                self.sums.settled()

        calibrator = Calibrator(exchanges, self.task, kept_ranges, keep)
        result = calibrator.run(self.done, self.arrays, lines[-1])
        line = calibrator.line(lines[-1], result, time.monotonic() - started)
        self.journal.calibrate(calibration.dump(result).decode(), self.done, line)
        if self.sums is not None:
            self.sums.settled()
        self.directory.write_lines(self.journal.lines())

    def _commit(self, server_round: int, line: Line) -> None:
        memory = strategies.state(self.strategy)
        if self.central is not None:
            memory |= self.central.state()
        commit = checkpoints.write(self.directory.checkpoints, server_round, self.arrays, memory)
        self.journal.commit(commit, line)
        reach("after-commit", server_round)

    def _measure(self, server_round: int, trained: set[str], record: RoundRecord) -> None:
        exchange, availability = self.member_exchange, self.availability
        evaluator = Evaluator(
            self.config, self.task, self.run_id, exchange, availability, self.steps, self.sums
        )
        evaluator.measure(server_round, self.arrays, trained, record)

    def _cohort(self, present: dict[str, Member], server_round: int) -> list[str]:
        """The names of the sites that are invited to train."""
        if self.central is None:
            return selection.cohort(present, self.config, server_round, self._min_sites)
        # A small sample is no reason to skip a round: that would reveal the size of the secret sample.
        if len(present) < self._min_sites:
            return []
        return self.central.invite(server_round, present, self.journal.order())

    def _too_few(self, kind: str, count: int) -> str | None:
        """The reason why a round makes no model, where there are too few updates or sites; else None."""
        low = self._min_sites
        return None if count >= low else f"FE-501 {kind}: must be at least {low}, got {count}"

    @property
    def _min_sites(self) -> int:
        """The minimum number of sites with which a round makes a model."""
        secure = self.config.secure_aggregation
        if self.sums is not None:
            return max(self.config.round.min_sites, secure.min_sites * secure.groups)
        minimum = strategies.minimum_replies(self.config.strategy)
        return max(self.config.round.min_sites, minimum)

    def _compose(
        self,
        server_round: int,
        members: list[Member],
        secure: ConfigRecord | None = None,
        cohort_size: int | None = None,
    ) -> list[Message]:
        """The requests to train; ``cohort_size``, which the sites get, is the number of members unless given."""
        size = len(members) if cohort_size is None else cohort_size
        return requests.train(
            self.member_exchange.node_status.grid_client.grid,
            self.strategy,
            self.arrays,
            requests.settings(self.config, self.run_id, server_round, self.steps, size),
            members,
            self.accepted_rounds,
            self.config,
            needs_loss=strategies.weighs_by_loss(self.config.strategy),
            secure=secure,
        )

    def _train(
        self, server_round: int, names: list[str], record: RoundRecord, size: int | None = None
    ) -> tuple[Update, ...]:
        """Request updates from these sites; return those that pass validation. ``size`` as in ``_compose``."""
        members = [self.availability.members[name] for name in names]
        updates: list[Update] = []
        if members:
            needs_loss = strategies.weighs_by_loss(self.config.strategy)
            messages = self._compose(server_round, members, cohort_size=size)
            sent = messages[0].content.array_records[protocol.ARRAYS]
            expected = Expected(
                self.run_id,
                server_round,
                _numpy(sent),
                self.config.admission,
                needs_loss,
                private=self.config.privacy.mechanism != "off",
                noise_norm=self._noise_norm(),
                delta=self.config.privacy.delta,
            )
            reach("before-dispatch", server_round)
            result = self.member_exchange.ask(server_round, "train", members, messages)
            reach("all-received", server_round)
            record.count(result, members, self.config.round.deadline)
            for member in members:
                if member.node_id in result.replies:
                    reply = result.replies[member.node_id]
                    verdict = admit_train(reply, member.site, member.train_examples, expected)
                    record.take(verdict)
                    if verdict.update is not None:
                        updates.append(verdict.update)
            if needs_loss:
                updates, outliers = admit_losses(updates)
                record.rejections += outliers
        self._require(server_round, {u.site for u in updates}, record)
        return tuple(updates)

    def _train_for_noise(
        self, central: CentralNoise, server_round: int, present: list[Member], record: RoundRecord
    ) -> tuple[Singles, str | None]:
        """The single updates, after the model was stepped by their noised mean; the reason where it was not."""
        if reason := self._too_few("sites", len(present)):
            self._require(server_round, set(), record)
            record.central = central.skip(server_round)
            return Singles(()), reason
        # Where the sample is secret, the sites get the number of available sites instead of its size.
        cohort_size = len(present) if is_secret_sample(self.config.privacy) else None
        if not record.invited:
            # A strategy stores the round's weights as it composes requests; this one is not sent.
            self._compose(server_round, present[:1], cohort_size=cohort_size)
        updates = self._train(server_round, record.invited, record, cohort_size)
        if record.invited and not updates:
            _log.warning("round %d: no update was accepted, it is noise alone", server_round)
        registered = len(self.journal.sites())
        noised = central.release(server_round, updates, self.arrays, registered)
        record.central = noised.facts
        return Singles(updates), self._aggregate(server_round, noised.result)

    def _noise_norm(self) -> float:
        """The maximum L2 norm that a site's own noise may add to its update."""
        privacy = self.config.privacy
        if privacy.mechanism != "local":
            return 0.0
        size = sum(a.size for a in self.arrays.values() if a.dtype.kind == "f")
        return local.max_update_norm(privacy.clipping_bound, privacy.noise_multiplier or 0.0, size)

    def _train_securely(
        self, sums: SecureSums, server_round: int, names: list[str], record: RoundRecord
    ) -> tuple[RoundResult, str | None]:
        """The sum of the updates under secure aggregation; the reason where there is none."""
        members = [self.availability.members[name] for name in names]
        if reason := self._too_few("sites", len(members)):
            self._require(server_round, set(), record)
            return Singles(()), reason
        training = sums.train(
            server_round,
            members,
            partial(self._compose, server_round),
            self.arrays,
            control=isinstance(self.strategy, strategies.Scaffold),
        )
        outcome = training.outcome
        record.add(outcome.sent, outcome.received, outcome.rejections(members))
        record.secure = training.facts
        record.ledgers = {s: d for s, d in outcome.ledgers.items() if s in outcome.sites}
        if training.seen:
            seen = {"round": server_round, **training.seen}
            self.directory.write_json(self.directory.seen, seen)
        result: RoundResult = training.result or Singles(())
        trained, minimum = site_updates.sites(result), self.config.round.min_sites
        self._require(server_round, set(trained), record)
        reason = training.reason
        if reason is None and len(trained) < minimum:
            reason = f"FE-501 updates: must be at least {minimum}, got {len(trained)}"
        return result, reason

    def _secure_epsilon(self, server_round: int) -> dict[str, float | None] | None:
        """The epsilon of the run by adversary, where noise is distributed and the server can account for it."""
        if self.sums is None or self.config.privacy.mechanism != "distributed":
            return None
        updates, evaluations = (self.sums.attempts(p, server_round) for p in ("train", "evaluate"))
        return privacy_cost.masked_spent(self.config.privacy, self.spent, updates, evaluations)

    def _require(self, server_round: int, trained: set[str], record: RoundRecord) -> None:
        if missing := sorted(set(self.config.round.require_sites) - trained):
            reasons = "; ".join(
                f"{r.site}: FE-{r.code} {r.reason}" for r in record.rejections if r.site in missing
            )
            raise RunError(
                502, f"round {server_round}: must hold {', '.join(missing)}, got {reasons[:600]}"
            )

    def _aggregate(self, server_round: int, result: RoundResult) -> str | None:
        """Step the model; the reason where the round makes none, else None."""
        try:
            arrays = aggregate(
                self.strategy,
                server_round,
                result,
                self.arrays,
                with_loss=strategies.weighs_by_loss(self.config.strategy),
            )
        except RunError as error:
            _log.warning("round %d skipped: %s", server_round, error)
            return str(error)
        reach("mid-aggregate", server_round)
        self.arrays = arrays
        return None


def _numpy(sent: ArrayRecord) -> NDArrays:
    return {name: array.numpy() for name, array in sent.items()}


def _first(line: Line) -> str:
    """Why the first rejected site's update was not accepted."""
    first = line["rejected"][:1]
    return "; ".join(f"{r['site']}: FE-{r['code']} {r['reason']}" for r in first)[:300]
