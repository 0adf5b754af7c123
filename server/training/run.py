"""A run: its registration, its rounds, its end. Ours, over Flower's Grid.

A round either commits, with its checkpoint and its line, or leaves no trace; a killed coordinator continues after the
last commit. Everything random is a function of (seed, round, site), so a redone round is the same round.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Mapping

from flwr.serverapp import Grid

from fedge.server.aggregation import central_noise, strategies
from fedge.server.participants.availability import Availability
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.registration import Registry
from fedge.server.runs import checkpoints, results
from fedge.server.runs.directory import RunDirectory
from fedge.server.runs.journal import Journal
from fedge.server.runs.listener import Listener
from fedge.server.secagg.aggregator import SecureSums
from fedge.server.secagg.recovery import RecoveryStore
from fedge.server.training.round_loop import Loop
from fedge.server.transport.grid_calls import Clock, GridClient, Timeouts
from fedge.server.transport.node_status import NodeStatus
from fedge.shared.config.federation import Config
from fedge.shared.errors import ConfigError, RunError
from fedge.shared.failpoints import reach
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.steps import from_json
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.standardised_columns import column_bounds
from fedge.shared.tasks.task import Task
from fedge.shared.wire.tensors import NDArrays

#: What a full, read-only or failing disk answers.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


def run(
    grid: Grid,
    directory: RunDirectory,
    flower_run_id: int,
    listener: Listener,
    patience: Timeouts | None = None,
    clock: Clock | None = None,
    seats: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Play all rounds that are not committed yet, then write the run's results.

    Args:
        grid: Flower's, whose nodes are the sites.
        directory: prepared, see ``run_directory.prepare``.
        flower_run_id: of the Flower run that carries this run now.
        listener: told of every reply and round, and of what is waited for.
        patience: how long what is waited for.
        clock: where the time is from.
        seats: see ``Census``.

    Raises:
        RunError: 501 to 507; what was committed stays, and the run can be resumed.
        ConfigError: 208, another process runs it.
    """
    with directory.lock():
        config = directory.load_config()
        task = get_task(config.task.name)
        journal = Journal(directory.journal)
        try:
            row = results.begin(journal, directory)
            if row.finished is not None:
                return
            journal.begin_flower_run(flower_run_id, results.now())
            link = GridClient(grid, clock or Clock(), patience or Timeouts())
            loop = _prepare(
                link, directory, config, task, journal, row.id, flower_run_id, listener, seats
            )
            listener.start(config.run.rounds, loop.done)
            # Some of Flower's strategies collect garbage once a reply; torch's many objects need no walk each time.
            gc.freeze()
            loop.catch_up()
            while loop.done < config.run.rounds:
                loop.play(loop.done + 1)
            loop.calibrate()
            reach("before-export", config.run.rounds)
            results.complete(directory, journal, config, loop.arrays)
        except (RunError, KeyboardInterrupt, SystemExit):
            # The report is wanted most when a run stops.
            results.report_so_far(directory)
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
    link: GridClient,
    directory: RunDirectory,
    config: Config,
    task: Task,
    journal: Journal,
    run_id: str,
    flower_run_id: int,
    listener: Listener,
    seats: Callable[[], Mapping[str, str]] | None,
) -> Loop:
    arrays = checkpoints.initial_arrays(task, config.run.seed)
    memory: NDArrays = {}
    last = journal.last()
    if last is None:
        last = checkpoints.write(directory.checkpoints, 0, arrays, {})
        journal.commit(last, {})
    else:
        arrays, memory = checkpoints.load(directory.checkpoints, last, list(arrays))
    kept = checkpoints.checkpoints_kept(config.privacy, config.run.rounds, last.number)
    checkpoints.prune(directory.checkpoints, last.number, kept)
    census = Registry(NodeStatus(link), config, task, run_id, journal, listener, seats)
    members, refused = census.take(flower_run_id)
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
    noise = central_noise.for_run(
        config.privacy, config.run.rounds, arrays, config.run.evaluate_every
    )
    if noise is not None:
        noise.restore(memory, last.number)
        # Past noise is as secret as the updates under it.
        directory.checkpoints.chmod(0o700)
    lines = journal.lines()
    directory.write_lines(lines)
    attendance = Availability(census, members, refused)
    talk = MemberExchange(run_id, config, census.live, attendance, listener)
    sums = None
    if config.secure_aggregation.enabled:
        sums = SecureSums(talk, RecoveryStore(directory.path), config, task)
    if journal.run_preprocessing_missing():
        fit_preprocessing(journal, task, config, census, sums)
        if sums is not None:
            sums.settled()
    steps = from_json(results.begun(journal).preprocessing)
    loop = Loop(
        directory,
        config,
        task,
        journal,
        run_id,
        listener,
        talk,
        attendance,
        strategy,
        steps,
        arrays,
        last.number,
        sums,
        noise,
    )
    loop.remember(lines)
    results.write_run(directory, journal, config, loop.counted)
    return loop


def fit_preprocessing(
    journal: Journal, task: Task, config: Config, census: Registry, sums: SecureSums | None = None
) -> None:
    """Write down the preprocessing with mean and deviation over all registered sites, where they are to be had.

    Args:
        journal: of the run, which has none yet.
        task: of the run.
        config: of the run.
        census: taken.
        sums: where the sites' statistics are summed under masks.

    Raises:
        RunError: 510, that sum could not be opened.
    """
    steps = task.preprocessing
    if sums is not None and config.data.standardise == "federated" and column_bounds(task):
        steps = preprocessing.fitted(steps, sums.statistics(census.members()).standardise())
    elif parts := census.statistics():
        steps = preprocessing.fitted(steps, preprocessing.pooled(parts).standardise())
    journal.fix_preprocessing([step.to_json() for step in steps])
