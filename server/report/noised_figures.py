"""Metrics with noise, and how they are shown: never without the noise's standard deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from fedge.server.report.format import MISSING, THIN, is_share, metric_name, metric_value
from fedge.server.report.json_values import mapping, numbers, text
from fedge.server.report.records import Round, Run

#: Standard deviation beyond which noise hides a share between 0 and 1; the terminal and the release have the same.
NOISE_FLOOR: Final = 0.25
WORDS: Final = "lost in noise"
#: What the figure after the sign is.
SIGN: Final = "± is the standard deviation of the noise"


class Noise(NamedTuple):
    """Standard deviations of the noise on an evaluation's figures.

    Attributes:
        unit: of privacy, ``site`` or ``example``; empty where there is no noise.
        views: by view (``site_mean``, ``pooled``) and metric.
        per_site: by site and metric.
    """

    unit: str
    views: Mapping[str, Mapping[str, float]]
    per_site: Mapping[str, Mapping[str, float]]

    def stddev(self, view: str, metric: str) -> float | None:
        """Standard deviation of the noise on a figure of all sites, None where it is exact.

        Args:
            view: ``site_mean`` or ``pooled``, as in the round's line.
            metric: name of the metric.
        """
        stddev = self.views.get(view, {}).get(metric)
        # Noise of unknown size hides everything.
        return math.inf if stddev is None and self.unit else stddev

    def site_stddev(self, site: str, metric: str) -> float | None:
        """Standard deviation of the noise on one site's own figure, None where it is exact."""
        stddev = self.per_site.get(site, {}).get(metric)
        return math.inf if stddev is None and self.unit else stddev


def parsed(values: Mapping[str, Any]) -> Noise:
    """The noise record of a line's metrics, or of metrics.json."""
    views = {view: numbers(values.get(view)) for view in ("site_mean", "pooled")}
    per_site = {s: numbers(v) for s, v in mapping(values.get("per_site")).items()}
    return Noise(text(values.get("unit")), views, per_site)


def last(run: Run) -> Noise:
    """The noise on the evaluation that the report leads with."""
    return parsed(run.noise)


def round_noise(r: Round) -> Noise:
    """The noise on a round's evaluation."""
    return parsed(r.noise)


def below_noise_floor(stddev: float | None) -> bool:
    """Whether noise of this standard deviation hides a share between 0 and 1; False where there is none."""
    return stddev is not None and not stddev <= NOISE_FLOOR


def spread(metric: str, stddev: float) -> str:
    """A standard deviation in the metric's unit, rounded up: it must not read smaller than it is.

    Args:
        metric: name of the metric; shares are in percentage points, without a sign.
        stddev: in the unit of the metric.
    """
    if is_share(metric):
        return f"{math.ceil(1000 * stddev - 1e-9) / 10:.1f}"
    return f"{math.ceil(1000 * stddev - 1e-9) / 1000:.3f}"


def shown(metric: str, value: float | None, stddev: float | None) -> str:
    """A metric in its own unit with the standard deviation of its noise (text).

    Args:
        metric: name of the metric.
        value: None where it was not measured.
        stddev: None where the value is exact.
    """
    if value is None:
        return MISSING
    if stddev is None:
        return metric_value(metric, value)
    if below_noise_floor(stddev):
        return WORDS
    return f"{metric_value(metric, value)}{THIN}±{THIN}{spread(metric, stddev)}"


def sites_alike(run: Run) -> bool:
    """Whether every site has the same weight in figures of all sites, so that site mean and pooled are one figure."""
    return last(run).unit == "site"


def outcome(run: Run) -> str:
    """The lead metric over all sites, for the headline (text); empty where there is none."""
    lead, noise, alike = run.lead, last(run), sites_alike(run)
    views = [(run.site_mean, "site_mean", " site mean"), (run.pooled, "pooled", " pooled")]
    if alike:
        views = [(run.pooled, "pooled", "")]
    figures = [(values[lead], noise.stddev(v, lead), w) for values, v, w in views if lead in values]
    parts = [
        f"{shown(lead, value, sd)}{words}"
        for value, sd, words in figures
        if not below_noise_floor(sd)
    ]
    if not parts:
        return f"{metric_name(lead)} {WORDS}" if figures else ""
    sign = f" ({SIGN})" if noise.unit else ""
    return f"{' and '.join(parts)} {metric_name(lead)}{', every site alike' if alike else ''}{sign}"


def over_all(run: Run) -> list[str]:
    """The pooled result as a sentence (text), where no site's own result is reported."""
    lead, noise = run.lead, last(run)
    stddev = noise.stddev("pooled", lead)
    how = ", every site alike" if sites_alike(run) else ""
    value = shown(lead, run.pooled[lead], stddev)
    value = (
        f"{metric_name(lead)} is {WORDS}"
        if below_noise_floor(stddev)
        else f"{metric_name(lead)} of {value}"
    )
    sign = f" ({SIGN})" if noise.unit and not below_noise_floor(stddev) else ""
    return [f"Measured over all sites' held-out examples together{how}: {value}{sign}."]
