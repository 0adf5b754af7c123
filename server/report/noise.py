"""Metrics with noise, and how they are shown: never without the noise's standard deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from fedge.server.report.format import MISSING, THIN, is_share, metric_name, metric_value
from fedge.server.report.json_values import mapping, numbers, text
from fedge.server.report.records import Round, Run

#: Standard deviation beyond which a share between 0 and 1 says nothing; the terminal and the release have the same.
NOISE_FLOOR: Final = 0.25
WORDS: Final = "lost in noise"
#: What the figure after the sign is.
SIGN: Final = "± is the standard deviation of the noise"


class Noise(NamedTuple):
    """Of an evaluation's figures.

    Attributes:
        unit: what it hides, ``site`` or ``example``; empty where there is none.
        views: by view, by metric: standard deviation.
        per_site: by site, by metric.
    """

    unit: str
    views: Mapping[str, Mapping[str, float]]
    per_site: Mapping[str, Mapping[str, float]]

    def of(self, view: str, metric: str) -> float | None:
        """Standard deviation of a figure about all sites, None where it is exact; ``view`` as in the round's line."""
        found = self.views.get(view, {}).get(metric)
        # Noise of which nothing is known hides everything.
        return math.inf if found is None and self.unit else found

    def of_site(self, site: str, metric: str) -> float | None:
        """Likewise of one site's own."""
        found = self.per_site.get(site, {}).get(metric)
        return math.inf if found is None and self.unit else found


def parsed(told: Mapping[str, Any]) -> Noise:
    """What a line's metrics, or metrics.json, say of noise."""
    views = {view: numbers(told.get(view)) for view in ("site_mean", "pooled")}
    per_site = {s: numbers(v) for s, v in mapping(told.get("per_site")).items()}
    return Noise(text(told.get("unit")), views, per_site)


def last(run: Run) -> Noise:
    """That of the evaluation that the report leads with."""
    return parsed(run.noise)


def of_round(r: Round) -> Noise:
    """A round's."""
    return parsed(r.noise)


def below_noise_floor(deviation: float | None) -> bool:
    """Whether a figure says nothing."""
    return deviation is not None and not deviation <= NOISE_FLOOR


def spread(metric: str, deviation: float) -> str:
    """A standard deviation in the metric's unit, rounded up: noise must not read smaller than it is."""
    if is_share(metric):
        return f"{math.ceil(1000 * deviation - 1e-9) / 10:.1f}"
    return f"{math.ceil(1000 * deviation - 1e-9) / 1000:.3f}"


def shown(metric: str, value: float | None, deviation: float | None) -> str:
    """A metric in its own unit with what the noise may have made of it (text)."""
    if value is None:
        return MISSING
    if deviation is None:
        return metric_value(metric, value)
    if below_noise_floor(deviation):
        return WORDS
    return f"{metric_value(metric, value)}{THIN}±{THIN}{spread(metric, deviation)}"


def sites_alike(run: Run) -> bool:
    """Whether every site weighs the same in what is said of all of them, so that there is one such figure only."""
    return last(run).unit == "site"


def outcome(run: Run) -> str:
    """The lead metric over all sites, for the headline (text); empty where there is none."""
    lead, noise, alike = run.lead, last(run), sites_alike(run)
    views = [(run.site_mean, "site_mean", " site mean"), (run.pooled, "pooled", " pooled")]
    if alike:
        views = [(run.pooled, "pooled", "")]
    found = [(values[lead], noise.of(v, lead), w) for values, v, w in views if lead in values]
    told = [
        f"{shown(lead, value, sd)}{words}"
        for value, sd, words in found
        if not below_noise_floor(sd)
    ]
    if not told:
        return f"{metric_name(lead)} {WORDS}" if found else ""
    sign = f" ({SIGN})" if noise.unit else ""
    return f"{' and '.join(told)} {metric_name(lead)}{', every site alike' if alike else ''}{sign}"


def over_all(run: Run) -> list[str]:
    """What was measured over all sites together, where no site's own result is told (text)."""
    lead, noise = run.lead, last(run)
    deviation = noise.of("pooled", lead)
    how = ", every site alike" if sites_alike(run) else ""
    value = shown(lead, run.pooled[lead], deviation)
    value = (
        f"{metric_name(lead)} is {WORDS}"
        if below_noise_floor(deviation)
        else f"{metric_name(lead)} of {value}"
    )
    sign = f" ({SIGN})" if noise.unit and not below_noise_floor(deviation) else ""
    return [f"Measured over all sites' held-out examples together{how}: {value}{sign}."]
