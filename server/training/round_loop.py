"""One round after the other: invite, collect until the deadline, admit, aggregate, evaluate, commit.

Everything random is a function of (seed, round, site), so a redone round is the same round. Noise that the server adds
is none of this: a redone round draws anew, and so nothing of a round may leave before it is committed; there, the model
goes out to be evaluated afterwards.
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
from fedge.server.aggregation.central_noise import CentralNoise
from fedge.server.aggregation.privacy_cost import is_secret_sample
from fedge.server.aggregation.step import aggregate
from fedge.server.aggregation.updates import RoundResult, Singles, Update
from fedge.server.participants import messages as requests
from fedge.server.participants.availability import Availability
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.members import Member
from fedge.server.runs import checkpoints
from fedge.server.runs import results as run_results
from fedge.server.runs.checkpoints import checkpoints_kept
from fedge.server.runs.directory import RunDirectory
from fedge.server.runs.journal import Journal, Line
from fedge.server.runs.listener import Listener
from fedge.server.secagg.aggregator import SecureSums
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

    ``arrays`` and ``strategy`` are the state after round ``done``; ``sums`` is there where updates are masked,
    ``central`` where the server adds noise.
    """

    directory: RunDirectory
    config: Config
    task: Task
    journal: Journal
    run_id: str
    listener: Listener
    talk: MemberExchange
    attendance: Availability
    strategy: flower.FedAvg
    steps: tuple[Step, ...]
    arrays: NDArrays
    done: int
    sums: SecureSums | None = None
    central: CentralNoise | None = None
    accepted: dict[str, int] = field(default_factory=dict)
    counted: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    consecutive_failed_rounds: int = 0
    spent: dict[str, float | None] = field(default_factory=dict)

    def remember(self, lines: list[Line]) -> None:
        """Take from committed rounds whose update counted when, and how many were skipped at the end."""
        for line in lines:
            self._note(line)

    def _note(self, line: Line) -> None:
        self.spent = line.get(privacy_cost.KEY, self.spent)
        if line["outcome"] == "committed":
            self.counted.update(line["trained"])
            self.accepted |= dict.fromkeys(line["trained"], line["round"])
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
        present, absent = self.attendance.open(server_round, self._least)
        if isinstance(self.strategy, strategies.Scaffold):
            self.strategy.num_sites = len(self.journal.sites())
        names = self._cohort(present, server_round)
        tally = RoundRecord(invited=names, rejections=absent)
        result: RoundResult
        if self.sums is not None:
            result, reason = self._train_securely(self.sums, server_round, names, tally)
            reason = reason or self._aggregate(server_round, result)
        elif self.central is not None:
            result, reason = self._train_for_noise(
                self.central, server_round, list(present.values()), tally
            )
        else:
            updates = self._train(server_round, names, tally)
            result, reason = Singles(updates), self._too_few("updates", len(updates))
            reason = reason or self._aggregate(server_round, result)
        if self.central is None:
            self._measure(server_round, set(site_updates.sites(result)), tally)
        tally.masked_epsilon = self._secure_epsilon(server_round)
        line = tally.line(
            server_round, reason, result, digest(self.arrays), time.monotonic() - started
        )
        self._commit(server_round, line)
        if self.central is not None:
            self._measure(server_round, set(line["trained"]), tally)
            line = tally.completed(line, time.monotonic() - started)
            self.journal.amend(server_round, line)
        if self.sums is not None:
            self.sums.settled()
        self.done = server_round
        self._note(line)
        self.directory.append_line(line)
        kept = checkpoints_kept(self.config.privacy, self.config.run.rounds, server_round)
        checkpoints.prune(self.directory.checkpoints, server_round, kept)
        run_results.write_run(self.directory, self.journal, self.config, self.counted)
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
        """Evaluate the last round where a kill came after its commit; only then does it lack that."""
        lines = self.journal.lines()
        if self.central is None or not lines or "pooled" in lines[-1]["metrics"]:
            return
        tally, line = RoundRecord.of(lines[-1]), lines[-1]
        self._measure(self.done, set(line["trained"]), tally)
        if tally.metrics:
            self.journal.amend(self.done, tally.completed(line, line["seconds"]))
            self.directory.write_lines(self.journal.lines())

    def calibrate(self) -> None:
        """Ask the sites about the final model where that is configured and not done yet."""
        lines = self.journal.lines()
        if not self.config.calibration.enabled or self.journal.calibration() is not None:
            return
        if not any(line["outcome"] == "committed" for line in lines):
            return
        started = time.monotonic()
        exchanges = Exchanges(
            self.config, self.run_id, self.talk, self.attendance, self.steps, self.sums
        )
        kept = self.journal.ranges()
        known = None if kept is None else calibration.parse(kept.encode())

        def keep(ranges: Calibration) -> None:
            line = exchanges.charged(lines[-1])
            self.journal.keep_ranges(calibration.dump(ranges).decode(), self.done, line)
            if self.sums is not None:
                self.sums.settled()

        calibrator = Calibrator(exchanges, self.task, known, keep)
        found = calibrator.run(self.done, self.arrays, lines[-1])
        line = calibrator.line(lines[-1], found, time.monotonic() - started)
        self.journal.calibrate(calibration.dump(found).decode(), self.done, line)
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

    def _measure(self, server_round: int, trained: set[str], tally: RoundRecord) -> None:
        Evaluator(
            self.config, self.task, self.run_id, self.talk, self.attendance, self.steps, self.sums
        ).measure(server_round, self.arrays, trained, tally)

    def _cohort(self, present: dict[str, Member], server_round: int) -> list[str]:
        """Who is asked to train."""
        if self.central is None:
            return requests.cohort(present, self.config, server_round, self._least)
        # How few were drawn is no reason to leave a round out, or it would tell.
        if len(present) < self._least:
            return []
        return self.central.invite(server_round, present, self.journal.order())

    def _too_few(self, what: str, found: int) -> str | None:
        """Why a round makes no model, where these are too few."""
        least = self._least
        return None if found >= least else f"FE-501 {what}: must be at least {least}, got {found}"

    @property
    def _least(self) -> int:
        """Sites without which a round makes no model."""
        secure = self.config.secure_aggregation
        if self.sums is not None:
            return max(self.config.round.min_sites, secure.min_sites * secure.groups)
        least = strategies.minimum_replies(self.config.strategy)
        return max(self.config.round.min_sites, least)

    def _compose(
        self,
        server_round: int,
        asked: list[Member],
        secure: ConfigRecord | None = None,
        among: int | None = None,
    ) -> list[Message]:
        """The requests to train; ``among`` how many sites, which are told that number, is ``asked`` unless given."""
        told = len(asked) if among is None else among
        return requests.train(
            self.talk.live.link.grid,
            self.strategy,
            self.arrays,
            requests.settings(self.config, self.run_id, server_round, self.steps, told),
            asked,
            self.accepted,
            self.config,
            needs_loss=strategies.weighs_by_loss(self.config.strategy),
            secure=secure,
        )

    def _train(
        self, server_round: int, names: list[str], tally: RoundRecord, among: int | None = None
    ) -> tuple[Update, ...]:
        """Updates that pass the gate."""
        asked = [self.attendance.members[name] for name in names]
        updates: list[Update] = []
        if asked:
            needs_loss = strategies.weighs_by_loss(self.config.strategy)
            messages = self._compose(server_round, asked, among=among)
            sent = messages[0].content.array_records[protocol.ARRAYS]
            expected = Expected(
                self.run_id,
                server_round,
                _numpy(sent),
                self.config.admission,
                needs_loss,
                private=self.config.privacy.mechanism != "off",
                noise_norm=self._noise_norm(),
            )
            reach("before-dispatch", server_round)
            result = self.talk.ask(server_round, "train", asked, messages)
            reach("all-received", server_round)
            tally.count(result, asked, self.config.round.deadline)
            for member in asked:
                if member.node_id in result.replies:
                    reply = result.replies[member.node_id]
                    verdict = admit_train(reply, member.site, member.train_examples, expected)
                    tally.take(verdict)
                    if verdict.update is not None:
                        updates.append(verdict.update)
            if needs_loss:
                updates, outliers = admit_losses(updates)
                tally.rejections += outliers
        self._require(server_round, {u.site for u in updates}, tally)
        return tuple(updates)

    def _train_for_noise(
        self, central: CentralNoise, server_round: int, present: list[Member], tally: RoundRecord
    ) -> tuple[Singles, str | None]:
        """Single updates, and the model stepped by their noised mean; the reason where there is none."""
        if reason := self._too_few("sites", len(present)):
            self._require(server_round, set(), tally)
            tally.central = central.skip(server_round)
            return Singles(()), reason
        # Where the sample is secret, nobody is told its size.
        among = len(present) if is_secret_sample(self.config.privacy) else None
        if not tally.invited:
            # A strategy learns the round's weights as it composes requests; this one is not sent.
            self._compose(server_round, present[:1], among=among)
        updates = self._train(server_round, tally.invited, tally, among)
        if tally.invited and not updates:
            _log.warning("round %d: no update counted, so that it is noise alone", server_round)
        registered = len(self.journal.sites())
        noised = central.release(server_round, updates, self.arrays, registered)
        tally.central = noised.facts
        return Singles(updates), self._aggregate(server_round, noised.result)

    def _noise_norm(self) -> float:
        """What a site's own noise may add to its update's norm."""
        privacy = self.config.privacy
        if privacy.mechanism != "local":
            return 0.0
        size = sum(a.size for a in self.arrays.values() if a.dtype.kind == "f")
        return local.max_update_norm(privacy.clipping_bound, privacy.noise_multiplier or 0.0, size)

    def _train_securely(
        self, sums: SecureSums, server_round: int, names: list[str], tally: RoundRecord
    ) -> tuple[RoundResult, str | None]:
        """The sum of the updates under masks; the reason where there is none."""
        asked = [self.attendance.members[name] for name in names]
        if len(asked) < self._least:
            self._require(server_round, set(), tally)
            return Singles(()), f"FE-501 sites: must be at least {self._least}, got {len(asked)}"
        found = sums.train(
            server_round,
            asked,
            partial(self._compose, server_round),
            self.arrays,
            control=isinstance(self.strategy, strategies.Scaffold),
        )
        outcome = found.outcome
        tally.add(outcome.sent, outcome.received, outcome.rejections(asked))
        tally.secure = found.facts
        tally.ledgers = {s: d for s, d in outcome.ledgers.items() if s in outcome.sites}
        if found.seen:
            self.directory.write_json(self.directory.seen, {"round": server_round, **found.seen})
        result: RoundResult = found.result or Singles(())
        trained, least = site_updates.sites(result), self.config.round.min_sites
        self._require(server_round, set(trained), tally)
        reason = found.reason
        if reason is None and len(trained) < least:
            reason = f"FE-501 updates: must be at least {least}, got {len(trained)}"
        return result, reason

    def _secure_epsilon(self, server_round: int) -> dict[str, float | None] | None:
        """What the run has cost a site at most, where distributed noise lets the server reckon it."""
        if self.sums is None or self.config.privacy.mechanism != "distributed":
            return None
        updates, evaluations = (self.sums.attempts(p, server_round) for p in ("train", "evaluate"))
        return privacy_cost.masked_spent(self.config.privacy, self.spent, updates, evaluations)

    def _require(self, server_round: int, trained: set[str], tally: RoundRecord) -> None:
        if missing := sorted(set(self.config.round.require_sites) - trained):
            why = "; ".join(
                f"{r.site}: FE-{r.code} {r.reason}" for r in tally.rejections if r.site in missing
            )
            raise RunError(
                502, f"round {server_round}: must hold {', '.join(missing)}, got {why[:600]}"
            )

    def _aggregate(self, server_round: int, result: RoundResult) -> str | None:
        """Step the model; the reason where the round makes none."""
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
    """Why the first site's update did not count."""
    found = line["rejected"][:1]
    return "; ".join(f"{r['site']}: FE-{r['code']} {r['reason']}" for r in found)[:300]
