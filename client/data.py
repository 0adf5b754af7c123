"""A site's examples: the rows it holds, divided into those it trains on and those it tests on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge.client import partition
from fedge.client.draws import generator
from fedge.shared.config import SITE_NAME, Config, DataSection
from fedge.shared.errors import DataError
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

    Raises:
        DataError: 301 or 302, the task's files; 303, they cannot be divided so.
    """
    table = task.load(config.data.path)
    rows_of = _rows_of(config, table)
    return {
        site: _share(site, rows_of[site], table, config.data, config.run.seed)
        for site in sorted(rows_of)
    }


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


def _share(site: str, rows: NDArray[Any], table: Table, data: DataSection, seed: int) -> SiteData:
    if table.test is not None:
        held_out = table.test[rows]
    else:
        count = min(max(round(len(rows) * data.test_fraction), MIN_TEST), len(rows) - MIN_TRAIN)
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
