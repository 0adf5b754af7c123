"""Metrics from the sites' counters: each site's, their unweighted mean, and the pooled value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedge.shared.privacy.charges import Unit
from fedge.shared.tasks.task import Metric


def ratios(
    metrics: tuple[Metric, ...], counters: Mapping[str, float], *, noised: bool = False
) -> dict[str, float]:
    """Every metric whose counters are there and whose denominator is not zero.

    Args:
        metrics: of the task.
        counters: by name.
        noised: counters have noise: a denominator that it made negative gives nothing, and a metric, which is a
            share, is held to [0, 1].
    """
    found: dict[str, float] = {}
    for metric in metrics:
        if metric.numerator in counters and metric.denominator in counters:
            if noised and counters[metric.denominator] <= 0:
                continue
            value = metric.value(counters)
            if value is not None:
                found[metric.name] = min(max(value, 0.0), 1.0) if noised else value
    return found


def summary(
    metrics: tuple[Metric, ...],
    sites: Mapping[str, Mapping[str, float]],
    hidden: Unit | None = None,
) -> dict[str, Any]:
    """The three views of an evaluation.

    Args:
        metrics: of the task.
        sites: counters by site, in name order; one that was dropped is missing.
        hidden: what noise on the counters hides; None where they are exact. Where it hides whole sites, no site's own
            metrics mean anything; and as each site weighs the same, the pooled value is the mean over them.

    Returns:
        ``per_site`` (site -> metric), ``site_mean`` (mean over the sites that have the metric, each counting the
        same) and ``pooled`` (ratio of the summed counters, as if all test rows were in one place).
    """
    noised = hidden is not None
    per_site = {site: ratios(metrics, c, noised=noised) for site, c in sites.items()}
    site_mean: dict[str, float] = {}
    pooled: dict[str, float] = {}
    for metric in metrics:
        both = {metric.numerator, metric.denominator}
        # What noise makes of one site's share does not decide whether it is in the sums: that would shift them.
        counted = [
            c
            for site, c in sites.items()
            if (both <= c.keys() if noised else metric.name in per_site[site])
        ]
        sums = {name: sum(c[name] for c in counted) for name in both}
        pooled |= ratios((metric,), sums, noised=noised) if counted else {}
        values = [row[metric.name] for row in per_site.values() if metric.name in row]
        if values:
            site_mean[metric.name] = sum(values) / len(values)
    if hidden == "site":
        return {"per_site": {}, "site_mean": dict(pooled), "pooled": pooled}
    return {"per_site": per_site, "site_mean": site_mean, "pooled": pooled}
