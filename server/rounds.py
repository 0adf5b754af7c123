"""The round loop: invite, collect until the deadline, admit, aggregate, evaluate, commit. Ours, over Flower's Grid.

A round either commits, with its checkpoint and its line, or leaves no trace; a killed coordinator continues after the
last commit. Everything random is a function of (seed, round, site), so a redone round is the same round.
"""

from __future__ import annotations

import errno
import gc
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedge.server import census, checkpoint, finish, requests, strategies
from fedge.server.admission import admit_evaluate, admit_losses, admit_train
from fedge.server.aggregation import aggregate
from fedge.server.census import Member
from fedge.server.exchange import Exchange, exchange
from fedge.server.journal import Journal, Line
from fedge.server.metrics import summary
from fedge.server.progress import Listener
from fedge.server.results import Singles, Update
from fedge.server.run_directory import RunDirectory
from fedge.server.tally import Tally
from fedge.server.verdicts import Evaluation, Expected, Rejection
from fedge.shared import protocol
from fedge.shared.arrays import NDArrays, digest
from fedge.shared.config import Config
from fedge.shared.errors import ConfigError, RunError
from fedge.shared.failpoints import reach
from fedge.shared.preprocess import Step, from_json
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.task import Task

_log = logging.getLogger(__name__)

#: What a full, read-only or failing disk answers.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


def run(grid: Grid, directory: RunDirectory, flower_run_id: int, listener: Listener) -> None:
    """Play all rounds that are not committed yet, then write the run's results.

    Args:
        grid: Flower's, whose nodes are the sites.
        directory: prepared, see ``run_directory.prepare``.
        flower_run_id: of the Flower run that carries this run now.
        listener: told of every reply and round.

    Raises:
        RunError: 501 to 507; what was committed stays, and the run can be resumed.
        ConfigError: 208, another process runs it.
    """
    with directory.lock():
        config = directory.load_config()
        task = get_task(config.task.name)
        journal = Journal(directory.journal)
        try:
            row = finish.begin(journal, directory)
            if row.finished is not None:
                return
            journal.begin_flower_run(flower_run_id, finish.now())
            loop = _prepare(grid, directory, config, task, journal, row.id, flower_run_id, listener)
            listener.start(config.run.rounds, loop.done)
            # Some of Flower's strategies collect garbage once a reply; torch's many objects need no walk each time.
            gc.freeze()
            while loop.done < config.run.rounds:
                loop.play(loop.done + 1)
            reach("before-export", config.run.rounds)
            finish.complete(directory, journal, config, loop.arrays)
        except (RunError, KeyboardInterrupt):
            # The report is wanted most when a run stops.
            finish.report_so_far(directory)
            raise
        except OSError as error:
            if error.errno not in _DISK:
                raise
            raise ConfigError(
                210, f"{directory.path}: must be writable, got {error.strerror or error}"
            ) from None
        finally:
            gc.unfreeze()
            journal.close()


def _prepare(
    grid: Grid,
    directory: RunDirectory,
    config: Config,
    task: Task,
    journal: Journal,
    run_id: str,
    flower_run_id: int,
    listener: Listener,
) -> Loop:
    arrays = checkpoint.initial_arrays(task, config.run.seed)
    memory: NDArrays = {}
    last = journal.last()
    if last is None:
        last = checkpoint.write(directory.checkpoints, 0, arrays, {})
        journal.commit(last, {})
    else:
        arrays, memory = checkpoint.load(directory.checkpoints, last, list(arrays))
    checkpoint.prune(directory.checkpoints, last.number)
    members, refused = census.take(grid, config, task, run_id, journal, flower_run_id)
    least = strategies.minimum_replies(config.strategy)
    if len(members) < least:
        raise RunError(
            506,
            f"strategy: {config.strategy.name} must have {least} sites or more, got {len(members)}",
        )
    strategy = strategies.build(
        config.strategy,
        client_learning_rate=config.train.learning_rate,
        num_sites=len(journal.sites()),
    )
    strategies.restore(strategy, memory)
    lines = journal.lines()
    directory.write_lines(lines)
    steps = from_json(finish.begun(journal).preprocessing)
    loop = Loop(
        grid,
        directory,
        config,
        task,
        journal,
        run_id,
        listener,
        members,
        strategy,
        steps,
        arrays,
        last.number,
        refused,
    )
    loop.remember(lines)
    finish.write_run(directory, journal, config, loop.counted)
    return loop


@dataclass
class Loop:
    """A run in progress. ``arrays`` and ``strategy`` are the state after round ``done``."""

    grid: Grid
    directory: RunDirectory
    config: Config
    task: Task
    journal: Journal
    run_id: str
    listener: Listener
    members: dict[str, Member]
    strategy: flower.FedAvg
    steps: tuple[Step, ...]
    arrays: NDArrays
    done: int
    refused: list[Rejection]
    accepted: dict[str, int] = field(default_factory=dict)
    counted: Counter[str] = field(default_factory=Counter)
    skipped: int = 0

    def remember(self, lines: list[Line]) -> None:
        """Take from committed rounds whose update counted when, and how many were skipped at the end."""
        for line in lines:
            self._note(line)

    def _away(self) -> list[Rejection]:
        """Sites of the run that did not register since the coordinator's last start."""
        told = {r.site for r in self.refused}
        return [
            Rejection(site, 409, "absent", "has not registered since the run was resumed")
            for site in self.journal.sites()
            if site not in self.members and site not in told
        ]

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
        names = requests.cohort(
            self.members,
            self.config,
            server_round,
            strategies.minimum_replies(self.config.strategy),
        )
        tally = Tally(invited=names, rejections=self.refused + self._away())
        self.refused = []
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
        sites = {m.node_id: m.site for m in asked}

        def on_reply(node: int, count: int) -> None:
            if training and count == 1:
                reach("one-received", server_round)
            self.listener.site(server_round, sites[node], count, len(asked))

        def on_pushed() -> None:
            if training:
                reach("after-dispatch", server_round)

        return exchange(self.grid, messages, self.config.round.deadline, on_reply, on_pushed)

    def _train(self, server_round: int, names: list[str], tally: Tally) -> tuple[Update, ...]:
        asked = [self.members[name] for name in names]
        needs_loss = strategies.weighs_by_loss(self.config.strategy)
        common = requests.settings(self.config, self.run_id, server_round, self.steps)
        messages = requests.train(
            self.grid,
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
        if missing := sorted(set(self.config.round.require_sites) - {u.site for u in updates}):
            why = "; ".join(
                f"{r.site}: FE-{r.code} {r.reason}" for r in tally.rejections if r.site in missing
            )
            raise RunError(
                502, f"round {server_round}: must hold {', '.join(missing)}, got {why[:300]}"
            )
        return tuple(updates)

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
        asked = [m for m in self.members.values() if m.test_examples and m.site not in out]
        common = requests.settings(self.config, self.run_id, server_round, self.steps)
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
