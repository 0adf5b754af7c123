"""One run over Flower's Grid, from the registration of the sites to the results after the last round.

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
from fedge.server.secagg.restart_state import RecoveryStore
from fedge.server.secagg.secure_sums import SecureSums
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

#: Error numbers of a full, read-only or failing disk.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


def run(
    grid: Grid,
    directory: RunDirectory,
    flower_run_id: int,
    listener: Listener,
    timeouts: Timeouts | None = None,
    clock: Clock | None = None,
    admitted_nodes: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Run all rounds that are not committed yet, then write the run's results.

    Args:
        grid: Flower's grid, whose nodes are the sites.
        directory: directory of the run, prepared by ``directory.prepare``.
        flower_run_id: id of the Flower run that carries this run now.
        listener: gets every reply and round, and what the run waits for.
        timeouts: how long the run waits; the defaults unless given.
        clock: source of time; the system's unless given.
        admitted_nodes: see ``Registry``.

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
            grid_client = GridClient(grid, clock or Clock(), timeouts or Timeouts())
            loop = _prepare(
                grid_client,
                directory,
                config,
                task,
                journal,
                row.id,
                flower_run_id,
                listener,
                admitted_nodes,
            )
            listener.start(config.run.rounds, loop.done)
            # Some of Flower's strategies collect garbage at every reply: exempt torch's many objects from that.
            gc.freeze()
            loop.catch_up()
            while loop.done < config.run.rounds:
                loop.play(loop.done + 1)
            loop.calibrate()
            reach("before-export", config.run.rounds)
            results.complete(directory, journal, config, loop.arrays)
        except (RunError, KeyboardInterrupt, SystemExit):
            # A report is needed most when a run stops.
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
    grid_client: GridClient,
    directory: RunDirectory,
    config: Config,
    task: Task,
    journal: Journal,
    run_id: str,
    flower_run_id: int,
    listener: Listener,
    admitted_nodes: Callable[[], Mapping[str, str]] | None,
) -> Loop:
    arrays = checkpoints.initial_arrays(task, config.run.seed)
    memory: NDArrays = {}
    last = journal.last()
    if last is None:
        last = checkpoints.write(directory.checkpoints, 0, arrays, {})
        journal.commit(last, {})
    else:
        arrays, memory = checkpoints.load(directory.checkpoints, last, list(arrays))
    kept = checkpoints.checkpoints_to_keep(config.privacy, config.run.rounds, last.number)
    checkpoints.prune(directory.checkpoints, last.number, kept)
    registry = Registry(
        NodeStatus(grid_client), config, task, run_id, journal, listener, admitted_nodes
    )
    members, refused = registry.take(flower_run_id)
    min_sites = strategies.minimum_replies(config.strategy)
    if len(members) < min_sites:
        raise RunError(
            506,
            f"strategy: {config.strategy.name} must have {min_sites} sites or more, got {len(members)}",
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
        # Noise of past rounds is as confidential as the updates that it protects.
        directory.checkpoints.chmod(0o700)
    lines = journal.lines()
    directory.write_lines(lines)
    availability = Availability(registry, members, refused)
    member_exchange = MemberExchange(run_id, config, registry.node_status, availability, listener)
    sums = None
    if config.secure_aggregation.enabled:
        sums = SecureSums(member_exchange, RecoveryStore(directory.path), config, task)
    if journal.run_preprocessing_missing():
        fit_preprocessing(journal, task, config, registry, sums)
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
        member_exchange,
        availability,
        strategy,
        steps,
        arrays,
        last.number,
        sums,
        noise,
    )
    loop.remember(lines)
    results.write_run(directory, journal, config, loop.update_counts)
    return loop


def fit_preprocessing(
    journal: Journal, task: Task, config: Config, registry: Registry, sums: SecureSums | None = None
) -> None:
    """Fit the preprocessing to the statistics of all registered sites, and store it in the journal.

    Without statistics the task's own preprocessing is stored.

    Args:
        journal: journal of the run, without preprocessing yet.
        task: task of the run.
        config: configuration of the run.
        registry: with all registered sites.
        sums: sums the sites' statistics under secure aggregation; None without it.

    Raises:
        RunError: 510, that sum could not be unmasked.
    """
    steps = task.preprocessing
    if sums is not None and config.data.standardise == "federated" and column_bounds(task):
        steps = preprocessing.fitted(steps, sums.statistics(registry.members()).standardise())
    elif parts := registry.statistics():
        steps = preprocessing.fitted(steps, preprocessing.pooled(parts).standardise())
    journal.fix_preprocessing([step.to_json() for step in steps])
