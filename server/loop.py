"""One round after the other: invite, collect until the deadline, admit, aggregate, evaluate, commit.

Everything random is a function of (seed, round, site), so a redone round is the same round.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import strategy as flower

from fedge.server import checkpoint, finish, requests, strategies
from fedge.server.admission import admit_evaluate, admit_losses, admit_train
from fedge.server.aggregation import aggregate
from fedge.server.attendance import Attendance
from fedge.server.conversation import Watch
from fedge.server.exchange import Exchange, exchange
from fedge.server.journal import Journal, Line
from fedge.server.liveness import Liveness
from fedge.server.members import Member
from fedge.server.metrics import summary
from fedge.server.progress import Listener
from fedge.server.results import Singles, Update
from fedge.server.run_directory import RunDirectory
from fedge.server.tally import Tally
from fedge.server.verdicts import Evaluation, Expected
from fedge.shared import protocol
from fedge.shared.arrays import NDArrays, digest
from fedge.shared.config import Config
from fedge.shared.errors import RunError
from fedge.shared.failpoints import reach
from fedge.shared.preprocess import Step
from fedge.shared.tasks.task import Task

_log = logging.getLogger(__name__)


@dataclass
class Loop:
    """A run in progress. ``arrays`` and ``strategy`` are the state after round ``done``."""

    directory: RunDirectory
    config: Config
    task: Task
    journal: Journal
    run_id: str
    listener: Listener
    live: Liveness
    attendance: Attendance
    strategy: flower.FedAvg
    steps: tuple[Step, ...]
    arrays: NDArrays
    done: int
    accepted: dict[str, int] = field(default_factory=dict)
    counted: Counter[str] = field(default_factory=Counter)
    skipped: int = 0

    def remember(self, lines: list[Line]) -> None:
        """Take from committed rounds whose update counted when, and how many were skipped at the end."""
        for line in lines:
            self._note(line)

    def _note(self, line: Line) -> None:
        if line["outcome"] == "committed":
            self.counted.update(line["trained"])
            self.accepted |= dict.fromkeys(line["trained"], line["round"])
            self.skipped = 0
        else:
            self.skipped += 1

    def play(self, server_round: int) -> None:
        """Play one round and commit it.

        Raises:
            RunError: 502, a required site's update is missing (nothing is committed); 503, too many rounds in a
                row without a model (the last of them is committed).
        """
        started = time.monotonic()
        least = strategies.minimum_replies(self.config.strategy)
        present, absent = self.attendance.open(
            server_round, max(self.config.round.min_sites, least)
        )
        if isinstance(self.strategy, strategies.Scaffold):
            self.strategy.num_sites = len(self.journal.sites())
        names = requests.cohort(present, self.config, server_round, least)
        tally = Tally(invited=names, rejections=absent)
        updates = self._train(server_round, names, tally)
        reason = self._aggregate(server_round, updates)
        every = self.config.run.evaluate_every
        if server_round % every == 0 or server_round == self.config.run.rounds:
            self._evaluate(server_round, {u.site for u in updates}, tally)
        line = tally.line(
            server_round, reason, updates, digest(self.arrays), time.monotonic() - started
        )
        commit = checkpoint.write(
            self.directory.checkpoints, server_round, self.arrays, strategies.state(self.strategy)
        )
        self.journal.commit(commit, line)
        reach("after-commit", server_round)
        self.done = server_round
        self._note(line)
        self.directory.append_line(line)
        checkpoint.prune(self.directory.checkpoints, server_round)
        finish.write_run(self.directory, self.journal, self.config, self.counted)
        self.listener.round(line)
        if self.skipped >= self.config.round.max_skipped:
            raise RunError(
                503,
                f"round {server_round}: must make a model, got the {self.skipped}. in a row without one ({reason})",
            )

    def _exchange(
        self, server_round: int, asked: list[Member], messages: list[Any], *, training: bool
    ) -> Exchange:
        sites = {m.node_id: m.site for m in self.attendance.members.values()}
        phase = "train" if training else "evaluate"
        listener, link = self.listener, self.live.link

        def on_reply(node: int, count: int) -> None:
            if training and count == 1:
                reach("one-received", server_round)
            listener.site(server_round, sites[node], count, len(asked))

        def on_pushed() -> None:
            if training:
                reach("after-dispatch", server_round)

        def on_waiting(nodes: Sequence[int], seconds: float) -> None:
            what = phase if link.failing_since is None else "superlink"
            listener.waiting(server_round, what, [sites[n] for n in nodes], seconds)

        def on_back(node: int, seconds: float) -> None:
            if node in sites:
                listener.back(server_round, sites[node], seconds)

        watch = Watch(
            reply=on_reply,
            pushed=on_pushed,
            sent=lambda done, total, nbytes: listener.sent(server_round, done, total, nbytes),
            waiting=on_waiting,
            lost=lambda node, seconds: listener.lost(server_round, sites[node], seconds),
            back=on_back,
        )
        probe = requests.probe(self.run_id, server_round, self.task.name, len(asked))
        deadline = self.config.round.deadline
        result = exchange(self.live, messages, deadline, watch, None if link.direct else probe)
        self.attendance.note(asked, result)
        return result

    def _train(self, server_round: int, names: list[str], tally: Tally) -> tuple[Update, ...]:
        asked = [self.attendance.members[name] for name in names]
        if not asked:
            self._require(server_round, (), tally)
            return ()
        needs_loss = strategies.weighs_by_loss(self.config.strategy)
        common = requests.settings(self.config, self.run_id, server_round, self.steps, len(asked))
        messages = requests.train(
            self.live.link.grid,
            self.strategy,
            self.arrays,
            common,
            asked,
            self.accepted,
            self.config,
            needs_loss=needs_loss,
        )
        sent = messages[0].content.array_records[protocol.ARRAYS]
        expected = Expected(
            self.run_id, server_round, _numpy(sent), self.config.admission, needs_loss
        )
        reach("before-dispatch", server_round)
        result = self._exchange(server_round, asked, messages, training=True)
        reach("all-received", server_round)
        tally.count(result, asked, self.config.round.deadline)
        updates: list[Update] = []
        for member in asked:
            if member.node_id in result.replies:
                verdict = admit_train(
                    result.replies[member.node_id], member.site, member.train_examples, expected
                )
                tally.take(verdict)
                if verdict.update is not None:
                    updates.append(verdict.update)
        if needs_loss:
            updates, outliers = admit_losses(updates)
            tally.rejections += outliers
        self._require(server_round, updates, tally)
        return tuple(updates)

    def _require(self, server_round: int, updates: Sequence[Update], tally: Tally) -> None:
        if missing := sorted(set(self.config.round.require_sites) - {u.site for u in updates}):
            why = "; ".join(
                f"{r.site}: FE-{r.code} {r.reason}" for r in tally.rejections if r.site in missing
            )
            raise RunError(
                502, f"round {server_round}: must hold {', '.join(missing)}, got {why[:600]}"
            )

    def _aggregate(self, server_round: int, updates: tuple[Update, ...]) -> str | None:
        """Step the model; the reason where the round makes none."""
        least = max(self.config.round.min_sites, strategies.minimum_replies(self.config.strategy))
        if len(updates) < least:
            return f"FE-501 updates: must be at least {least}, got {len(updates)}"
        try:
            arrays = aggregate(
                self.strategy,
                server_round,
                Singles(updates),
                self.arrays,
                with_loss=strategies.weighs_by_loss(self.config.strategy),
            )
        except RunError as error:
            _log.warning("round %d skipped: %s", server_round, error)
            return str(error)
        reach("mid-aggregate", server_round)
        self.arrays = arrays
        return None

    def _evaluate(self, server_round: int, trained: set[str], tally: Tally) -> None:
        # Quarantine for the round: what sent a bad update is not asked for figures either.
        out = {r.site for r in tally.rejections if r.outcome in ("rejected", "stale")} - trained
        out |= self.attendance.gone()
        members = self.attendance.members.values()
        asked = [m for m in members if m.test_examples and m.site not in out]
        common = requests.settings(self.config, self.run_id, server_round, self.steps, len(asked))
        messages = requests.evaluate(self.arrays, common, asked, self.config)
        expected = Expected(
            self.run_id, server_round, {}, self.config.admission, counters=self.task.counter_names
        )
        result = self._exchange(server_round, asked, messages, training=False)
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
        tally.metrics |= summary(self.task.metrics, admitted)


def _numpy(sent: ArrayRecord) -> NDArrays:
    return {name: array.numpy() for name, array in sent.items()}
