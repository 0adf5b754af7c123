"""The run's preprocessing: the task's steps, with what is learnt from all sites, fixed once for the whole run."""

from __future__ import annotations

from fedge.server.census import Census
from fedge.server.journal import Journal
from fedge.server.secagg.sums import SecureSums
from fedge.shared import preprocess
from fedge.shared.config import Config
from fedge.shared.tasks.columns import column_bounds
from fedge.shared.tasks.task import Task


def fix(
    journal: Journal, task: Task, config: Config, census: Census, sums: SecureSums | None = None
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
        steps = preprocess.fitted(steps, sums.statistics(census.members()).standardise())
    elif parts := census.statistics():
        steps = preprocess.fitted(steps, preprocess.pooled(parts).standardise())
    journal.fix_preprocessing([step.to_json() for step in steps])
