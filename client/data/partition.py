"""Which rows belong to which site: pure functions of labels, names and a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge.client.data.seeding import generator
from fedge.shared.errors import DataError

#: Minimum rows of a site, so that it can train and test.
MIN_ROWS = 4
MAX_ATTEMPTS = 1000


def site_names(count: int) -> list[str]:
    """Names of ``count`` sites, zero-padded so that they sort by number: ``site-01`` to ``site-10``."""
    width = len(str(count))
    return [f"site-{number:0{width}d}" for number in range(1, count + 1)]


def dirichlet(
    labels: NDArray[Any], sites: int, alpha: float, seed: int, min_rows: int = MIN_ROWS
) -> dict[str, NDArray[Any]]:
    """Divide the rows of each label by shares sampled from Dirichlet(alpha).

    Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification,
    2019, https://arxiv.org/abs/1909.06335, in the label-wise form that most later work uses.

    Args:
        labels: ``(n,)`` of int.
        sites: number of sites.
        alpha: concentration; smaller gives more heterogeneous sites.
        seed: the same seed gives the same shares.
        min_rows: minimum rows of a site; shares that leave a site fewer are sampled again.

    Returns:
        Site to row indices, ascending; every row in exactly one site.

    Raises:
        DataError: 303, too few rows, or no sample gave every site enough.
    """
    _need(len(labels), sites, min_rows)
    random = generator(seed, "dirichlet")
    classes, counts = np.unique(labels, return_counts=True)
    for _ in range(MAX_ATTEMPTS):
        shares = random.dirichlet(np.full(sites, alpha), size=len(classes))
        # Cutting points within each label's rows; the last is its count, so no row is left over.
        cuts = np.floor(np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
        cuts[:, -1] = counts
        sizes = np.diff(cuts, axis=1, prepend=0)
        if sizes.min() >= 0 and sizes.sum(axis=0).min() >= min_rows:
            break
    else:
        raise DataError(
            303,
            f"data.alpha: must leave each of {sites} sites {min_rows} of {len(labels)} rows,"
            f" got {alpha:g}, for which {MAX_ATTEMPTS} draws failed",
        )
    parts: list[list[NDArray[Any]]] = [[] for _ in range(sites)]
    for label, cut in zip(classes, cuts, strict=True):
        rows = random.permutation(np.flatnonzero(labels == label))
        for part, piece in zip(parts, np.split(rows, cut[:-1]), strict=True):
            part.append(piece)
    return {
        name: np.sort(np.concatenate(part))
        for name, part in zip(site_names(sites), parts, strict=True)
    }


def iid(rows: int, sites: int, seed: int, min_rows: int = MIN_ROWS) -> dict[str, NDArray[Any]]:
    """Divide rows at random into parts whose sizes differ by at most one.

    Args:
        rows: number of rows.
        sites: number of sites.
        seed: the same seed gives the same shares.
        min_rows: minimum rows of a site.

    Returns:
        Site to row indices, ascending.

    Raises:
        DataError: 303, too few rows.
    """
    _need(rows, sites, min_rows)
    order = generator(seed, "iid").permutation(rows)
    pieces = np.array_split(order, sites)
    return {name: np.sort(p) for name, p in zip(site_names(sites), pieces, strict=True)}


def natural(sites: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
    """Row indices by the site that the data themselves name, sites in sorted order.

    Args:
        sites: ``(n,)`` of str, the site of each row; None where the data name none.

    Raises:
        DataError: 303, the data name no sites.
    """
    if sites is None:
        raise DataError(
            303, "data.partition: must be dirichlet or iid for data without sites, got natural"
        )
    return {str(name): np.flatnonzero(sites == name) for name in np.unique(sites)}


def _need(rows: int, sites: int, min_rows: int) -> None:
    if rows < sites * min_rows:
        raise DataError(
            303,
            f"sites.count: must be at most {rows // min_rows} for {rows} rows"
            f" ({min_rows} a site), got {sites}",
        )
