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


def deviations(
    metrics: tuple[Metric, ...], counters: Mapping[str, float], noise: NoisedCounts, sites: int = 1
) -> dict[str, float]:
    """Standard deviation that noise gives to each metric that ``ratios`` finds, to first order.

    It is known to everybody: nothing but the noise's own deviation and what is told anyway is in it.

    Args:
        metrics: of the task.
        counters: sums over ``sites``, with noise.
        noise: of one site.
        sites: whose noise is in the sums.
    """
    spread = noise.deviation * math.sqrt(sites)
    found = {}
    for metric in metrics:
        value = ratios((metric,), counters, noised=True).get(metric.name)
        if value is not None:
            below = value if metric.denominator in noise.noised else 0.0
            found[metric.name] = spread * math.hypot(1.0, below) / counters[metric.denominator]
    return found


def masked_summary(
    metrics: tuple[Metric, ...],
    counters: Mapping[str, float],
    noise: NoisedCounts | None = None,
    sites: int = 0,
) -> dict[str, Any]:
    """The one view of an evaluation under masks; arguments as in ``deviations``, and ``noise`` None without any."""
    pooled = ratios(metrics, counters, noised=noise is not None)
    found: dict[str, Any] = {"per_site": {}, "site_mean": {}, "pooled": pooled}
    if noise is not None:
        spread = deviations(metrics, counters, noise, sites)
        found["noise"] = {"unit": noise.unit, "per_site": {}, "site_mean": {}, "pooled": spread}
    return found


def summary(
    metrics: tuple[Metric, ...],
    sites: Mapping[str, Mapping[str, float]],
    hidden: Unit | None = None,
    noise: NoisedCounts | None = None,
) -> dict[str, Any]:
    """The three views of an evaluation.

    Args:
        metrics: of the task.
        sites: counters by site, in name order; one that was dropped is missing.
        hidden: what noise on the counters hides; None where they are exact. Where it hides whole sites, no site's own
            metrics mean anything; and as each site weighs the same, the pooled value is the mean over them.
        noise: how much of it each site adds; its unit is ``hidden``.

    Returns:
        ``per_site`` (site -> metric), ``site_mean`` (mean over the sites that have the metric, each counting the
        same) and ``pooled`` (ratio of the summed counters, as if all test rows were in one place). With ``noise`` also
        ``noise``: its ``unit``, and the standard deviation of each of those figures. That of ``site_mean`` is the mean
        of the sites' own, as to hold each site's share to [0, 1] moves all of them the same way.
    """
    hidden = hidden if noise is None else noise.unit
    noised = hidden is not None
    per_site = {site: ratios(metrics, c, noised=noised) for site, c in sites.items()}
    site_mean: dict[str, float] = {}
    pooled: dict[str, float] = {}
    spread: dict[str, float] = {}
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
        if noise is not None and counted:
            spread |= deviations((metric,), sums, noise, len(counted))
        values = [row[metric.name] for row in per_site.values() if metric.name in row]
        if values:
            site_mean[metric.name] = sum(values) / len(values)
    if hidden == "site":
        per_site, site_mean = {}, dict(pooled)
    found: dict[str, Any] = {"per_site": per_site, "site_mean": site_mean, "pooled": pooled}
    if noise is None:
        return found
    each = {site: deviations(metrics, sites[site], noise) for site in per_site}
    of_mean = {name: _mean_of(each, name) for name in site_mean} if each else dict(spread)
    of = {"per_site": each, "site_mean": of_mean, "pooled": spread}
    return {**found, "noise": {"unit": noise.unit, **of}}


def _mean_of(rows: Mapping[str, Mapping[str, float]], name: str) -> float:
    values = [row[name] for row in rows.values() if name in row]
    return sum(values) / len(values)
