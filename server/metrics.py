"""Metrics from the sites' counters: each site's, their unweighted mean, and the pooled value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedge.shared.tasks.task import Metric


def ratios(metrics: tuple[Metric, ...], counters: Mapping[str, float]) -> dict[str, float]:
    """Every metric whose counters are there and whose denominator is not zero."""
    found: dict[str, float] = {}
    for metric in metrics:
        if metric.numerator in counters and metric.denominator in counters:
            value = metric.value(counters)
            if value is not None:
                found[metric.name] = value
    return found


def summary(
    metrics: tuple[Metric, ...], sites: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """The three views of an evaluation.

    Args:
        metrics: of the task.
        sites: counters by site, in name order; one that was dropped is missing.

    Returns:
        ``per_site`` (site -> metric), ``site_mean`` (mean over the sites that have the metric, each counting the
        same) and ``pooled`` (ratio of the summed counters, as if all test rows were in one place).
    """
    per_site = {site: ratios(metrics, counters) for site, counters in sites.items()}
    site_mean: dict[str, float] = {}
    pooled: dict[str, float] = {}
    for metric in metrics:
        values = [row[metric.name] for row in per_site.values() if metric.name in row]
        if not values:
            continue
        site_mean[metric.name] = sum(values) / len(values)
        counted = [c for site, c in sites.items() if metric.name in per_site[site]]
        pooled[metric.name] = sum(c[metric.numerator] for c in counted) / sum(
            c[metric.denominator] for c in counted
        )
    return {"per_site": per_site, "site_mean": site_mean, "pooled": pooled}
