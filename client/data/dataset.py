"""A site's examples, divided into a training and a test split."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge.client.data import partition
from fedge.client.data.seeding import generator
from fedge.client.settings.site_config import OwnData
from fedge.shared.config.federation import Config
from fedge.shared.errors import DataError, FedgeError, brief
from fedge.shared.protocol import SITE_NAME
from fedge.shared.tasks.task import Table, Task

MIN_TRAIN = 2
MIN_TEST = 1


@dataclass(frozen=True)
class SiteData:
    """Raw examples of one site, before preprocessing.

    Attributes:
        train_features, test_features: ``(n, *input.shape)``, float32.
        train_labels, test_labels: ``(n,)``, int64.
    """

    train_features: NDArray[Any]
    train_labels: NDArray[Any]
    test_features: NDArray[Any]
    test_labels: NDArray[Any]


def site_shares(config: Config, task: Task) -> dict[str, SiteData]:
    """Read a task's examples and divide them among sites, in sorted order of their names.

    Args:
        config: of the run; its partition, number of sites and seed are used.
        task: reads the examples.

    Raises:
        DataError: 301 or 302, the task's files or their content; 303, they cannot be
            divided so.
    """
    table = _loaded(task, config.data.path)
    rows_of = _rows_of(config, table)
    return {
        site: _share(site, rows_of[site], table, config.data.test_fraction, config.run.seed)
        for site in sorted(rows_of)
    }


def own_examples(task: Task, site: str, section: OwnData) -> SiteData:
    """Read the examples that one site holds by itself.

    Where the task's data name their sites and this one is among them, only those rows are used; else
    all rows are. Test examples are held out as in ``site_shares``.

    Args:
        task: reads the examples.
        site: name of the site.
        section: of ``site.toml``; its ``share`` is read elsewhere, see ``fedge.client.data.npy_files``.

    Raises:
        DataError: 301 or 302, the task's files or their content; 303, there are too few rows.
    """
    table = _loaded(task, section.path)
    rows = np.arange(len(table.labels))
    if table.sites is not None:
        named = np.flatnonzero(np.asarray(table.sites) == site)
        rows = named if len(named) else rows
    return _share(site, rows, table, section.test_fraction, section.seed)


def require_task_data(task: Task, data: SiteData) -> None:
    """Check examples that were given as arrays against the task.

    Raises:
        DataError: 302, their shape or their labels are not the task's; 303, there are too few.
    """
    shape, labels = task.input.shape, len(task.output.labels)
    for split, features, values, minimum in (
        ("train", data.train_features, data.train_labels, MIN_TRAIN),
        ("test", data.test_features, data.test_labels, MIN_TEST),
    ):
        if features.shape[1:] != shape:
            raise DataError(302, f"{split}: rows must have shape {shape}, got {features.shape[1:]}")
        if len(values) < minimum:
            raise DataError(303, f"{split}: must hold {minimum} rows or more, got {len(values)}")
        if values.min() < 0 or values.max() >= labels:
            raise DataError(302, f"{split}: labels must be 0 to {labels - 1}, got others")


def _loaded(task: Task, path: Path | None) -> Table:
    """The table that the task reads, checked against the task's declaration.

    Raises:
        DataError: 301 or 302 of the task itself; 302, it failed otherwise, or its table is not as declared.
    """
    try:
        table = task.load(path)
    except FedgeError:
        raise
    except Exception as error:
        raise DataError(302, f"task {task.name}: load failed: {brief(error)}") from error
    if not isinstance(table, Table):
        raise DataError(
            302, f"task {task.name}: load must give a Table, got {type(table).__name__}"
        )
    rows, shape = len(np.atleast_1d(table.labels)), task.input.shape
    for part, array, kind, expected in (
        ("features", table.features, "float32", (rows, *shape)),
        ("labels", table.labels, "int64", (rows,)),
    ):
        if not isinstance(array, np.ndarray) or array.dtype != kind or array.shape != expected:
            got = (
                f"{array.dtype} of shape {array.shape}"
                if isinstance(array, np.ndarray)
                else type(array).__name__
            )
            raise DataError(
                302, f"task {task.name}: {part} must be {kind} of shape {expected}, got {got}"
            )
    wrong = np.flatnonzero((table.labels < 0) | (table.labels >= len(task.output.labels)))
    if len(wrong):
        raise DataError(
            302,
            f"task {task.name}: row {wrong[0]}: the label must be 0 to"
            f" {len(task.output.labels) - 1}, got {table.labels[wrong[0]]}",
        )
    return table


def _rows_of(config: Config, table: Table) -> dict[str, NDArray[Any]]:
    match config.data.partition:
        case "dirichlet":
            return partition.dirichlet(
                table.labels, config.sites.count, config.data.alpha, config.run.seed
            )
        case "iid":
            return partition.iid(len(table.labels), config.sites.count, config.run.seed)
        case "natural":
            named = partition.natural(table.sites)
            for site in named:
                if not re.fullmatch(SITE_NAME, site):
                    raise DataError(302, f"site name: must match {SITE_NAME}, got {site[:80]!r}")
            return named


def _share(
    site: str, rows: NDArray[Any], table: Table, test_fraction: float, seed: int
) -> SiteData:
    if table.test is not None:
        held_out = table.test[rows]
    else:
        count = min(max(round(len(rows) * test_fraction), MIN_TEST), len(rows) - MIN_TRAIN)
        held_out = np.zeros(len(rows), dtype=np.bool_)
        held_out[generator(seed, site, "test").permutation(len(rows))[: max(count, 0)]] = True
    train, test = rows[~held_out], rows[held_out]
    if len(train) < MIN_TRAIN or len(test) < MIN_TEST:
        raise DataError(
            303,
            f"{site}: must hold {MIN_TRAIN} rows to train on and {MIN_TEST} to test on or more,"
            f" got {len(train)} and {len(test)}",
        )
    return SiteData(
        train_features=table.features[train],
        train_labels=table.labels[train],
        test_features=table.features[test],
        test_labels=table.labels[test],
    )
