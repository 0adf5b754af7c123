"""Metrics from the sites' counters: each site's, their unweighted mean, and the pooled value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedge.shared.config.privacy import Unit
from fedge.shared.privacy.mechanisms.noised_counts import NoisedCounts
from fedge.shared.tasks.task import Metric


def ratios(
    metrics: tuple[Metric, ...], counters: Mapping[str, float], *, noised: bool = False
) -> dict[str, float]:
    """Compute every metric whose counters are present and whose denominator is not zero.

    Args:
        metrics: metrics of the task.
        counters: name -> count.
        noised: counters have noise: a metric whose denominator is not positive is left out, and the others, which are
            ratios, are clipped to [0, 1].

    Returns:
        Name of the metric -> value.
    """
    values: dict[str, float] = {}
    for metric in metrics:
        if metric.numerator in counters and metric.denominator in counters:
            if noised and counters[metric.denominator] <= 0:
                continue
            value = metric.value(counters)
            if value is not None:
                values[metric.name] = min(max(value, 0.0), 1.0) if noised else value
    return values


def stddevs(
    metrics: tuple[Metric, ...], counters: Mapping[str, float], noise: NoisedCounts, sites: int = 1
) -> dict[str, float]:
    """Standard deviation that noise gives to each metric that ``ratios`` computes, to first order.

    It needs no privacy budget: it depends only on the noise's standard deviation and on reported counters.

    Args:
        metrics: metrics of the task.
        counters: sums over ``sites``, with noise.
        noise: the noise that one site adds.
        sites: number of sites whose noise is in the sums.

    Returns:
        Name of the metric -> standard deviation.
    """
    spread = noise.stddev * math.sqrt(sites)
    result = {}
    for metric in metrics:
        value = ratios((metric,), counters, noised=True).get(metric.name)
        if value is not None:
            below = value if metric.denominator in noise.noised else 0.0
            result[metric.name] = spread * math.hypot(1.0, below) / counters[metric.denominator]
    return result


def secure_summary(
    metrics: tuple[Metric, ...],
    counters: Mapping[str, float],
    noise: NoisedCounts | None = None,
    sites: int = 0,
) -> dict[str, Any]:
    """The pooled metrics of an evaluation under secure aggregation, in the form of ``summary``.

    Arguments as in ``stddevs``; ``noise`` is None without noise.
    """
    pooled = ratios(metrics, counters, noised=noise is not None)
    result: dict[str, Any] = {"per_site": {}, "site_mean": {}, "pooled": pooled}
    if noise is not None:
        spread = stddevs(metrics, counters, noise, sites)
        result["noise"] = {"unit": noise.unit, "per_site": {}, "site_mean": {}, "pooled": spread}
    return result


def summary(
    metrics: tuple[Metric, ...],
    sites: Mapping[str, Mapping[str, float]],
    unit: Unit | None = None,
    noise: NoisedCounts | None = None,
) -> dict[str, Any]:
    """The three views of an evaluation.

    Args:
        metrics: metrics of the task.
        sites: site -> its counters, in name order; a counter that was dropped is missing.
        unit: unit of privacy of the noise on the counters; None where they are exact. Where it is a whole site, no
            site's own metrics mean anything; and as each site weighs the same, the pooled value is the mean over them.
        noise: the noise that each site adds, which has the unit in it.

    Returns:
        ``per_site`` (site -> metric), ``site_mean`` (mean over the sites that have the metric, each counting the
        same) and ``pooled`` (ratio of the summed counters, as if all test rows were in one place). With ``noise`` also
        ``noise``: its ``unit``, and the standard deviation of each of these metrics. That of ``site_mean`` is the mean
        of the sites' own, as clipping each site's metric to [0, 1] moves all of them in the same direction.
    """
    unit = unit if noise is None else noise.unit
    noised = unit is not None
    per_site = {site: ratios(metrics, c, noised=noised) for site, c in sites.items()}
    site_mean: dict[str, float] = {}
    pooled: dict[str, float] = {}
    spread: dict[str, float] = {}
    for metric in metrics:
        both = {metric.numerator, metric.denominator}
        # Whether noise leaves one site a valid metric must not decide if it is in the sums: that would bias them.
        counted = [
            c
            for site, c in sites.items()
            if (both <= c.keys() if noised else metric.name in per_site[site])
        ]
        sums = {name: sum(c[name] for c in counted) for name in both}
        pooled |= ratios((metric,), sums, noised=noised) if counted else {}
        if noise is not None and counted:
            spread |= stddevs((metric,), sums, noise, len(counted))
        values = [row[metric.name] for row in per_site.values() if metric.name in row]
        if values:
            site_mean[metric.name] = sum(values) / len(values)
    if unit == "site":
        per_site, site_mean = {}, dict(pooled)
    result: dict[str, Any] = {"per_site": per_site, "site_mean": site_mean, "pooled": pooled}
    if noise is None:
        return result
    site_stddevs = {site: stddevs(metrics, sites[site], noise) for site in per_site}
    mean_stddevs = (
        {name: _mean_of(site_stddevs, name) for name in site_mean} if site_stddevs else dict(spread)
    )
    return {
        **result,
        "noise": {
            "unit": noise.unit,
            "per_site": site_stddevs,
            "site_mean": mean_stddevs,
            "pooled": spread,
        },
    }


def _mean_of(rows: Mapping[str, Mapping[str, float]], name: str) -> float:
    values = [row[name] for row in rows.values() if name in row]
    return sum(values) / len(values)
