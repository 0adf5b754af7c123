"""Part of the report's section on privacy: epsilon by round as the server computes it.

It can do so for noise that it adds itself, and for distributed noise, as it knows how often that was added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from fedge.server.report import format as fmt
from fedge.server.report.charts import Band, Line, line_chart, responsive
from fedge.server.report.json_values import mapping, number
from fedge.server.report.records import Run

#: Epsilon against the server (text).
UNBOUNDED: Final = "unbounded: it gets the updates before the noise"
#: Largest epsilon that is drawn.
_MAX_EPSILON: Final = 1e9
_SAMPLE_KNOWN: Final = "who also learns who was drawn"


class RunEpsilon(NamedTuple):
    """Epsilon of this run alone up to a round, as the server computes it.

    Attributes:
        round: its number.
        consumers: against model consumers.
        sample_known: against an adversary who also learns which sites each round sampled.
        delta: of both.
    """

    round: int
    consumers: float
    sample_known: float
    delta: float


def run_epsilons(run: Run) -> list[RunEpsilon]:
    """Epsilon after each round of a run, without rounds that record none."""
    epsilons = []
    for r in run.rounds:
        record = mapping(r.central.get("epsilon")) or r.masked_epsilon
        both = [number(record.get(key)) for key in ("consumers", "sample_known", "delta")]
        values = [value for value in both if value is not None and 0 <= value <= _MAX_EPSILON]
        if len(values) == len(both):
            epsilons.append(RunEpsilon(r.number, *values))
    return epsilons


def by_round(run: Run, epsilon_text: Callable[[float], str]) -> str:
    """A chart of both; one line where they are the same, as without sampling.

    Args:
        run: of which at least one round records epsilon.
        epsilon_text: formats an epsilon.
    """
    epsilons = run_epsilons(run)
    last = epsilons[-1]
    masked = any(r.masked_epsilon for r in run.rounds)
    name, short = ("both readers",) * 2 if masked else ("model's readers", "readers")
    points = [(t.round, t.consumers) for t in epsilons]
    lines = [_line(name, short, points, "mean", epsilon_text)]
    if masked:
        note = (
            f"Of this run alone, at delta {last.delta:g}, as the server reckons it for a site that was in every attempt"
            " at a sum; what a site has spent over all its runs stands in its own ledger. It is the same against the"
            " model's readers and the server, as the server sees sums alone and nobody is sampled."
        )
    else:
        note = (
            f"Of this run alone, at delta {last.delta:g}, as the server reckons it; what each site says, over all its"
            f" runs, stands in the table. Against the server epsilon is {UNBOUNDED}."
        )
    if any(t.sample_known != t.consumers for t in epsilons):
        sampled = [(t.round, t.sample_known) for t in epsilons]
        lines.append(_line(_SAMPLE_KNOWN, "sample known", sampled, "pooled", epsilon_text))
        note += (
            " Rings: for somebody who learns which sites each round drew, as from this report; the lower line holds"
            " while that stays secret."
        )
    # The band of no height has the axis begin at 0.
    bands = [Band("", [(epsilons[0].round, 0.0, 0.0)], "")]
    title = "Epsilon by round"
    curves = "; ".join(line.name for line in lines)
    draw = partial(
        line_chart, f"{title}: {curves}", ("round", "Epsilon"), lines, bands, limits=(0, math.inf)
    )
    return fmt.card(title, responsive(lambda w, p: draw(width=w, phone=p)), fmt.esc(note, 1000))


def _line(
    name: str,
    short: str,
    points: Sequence[tuple[float, float]],
    css: str,
    epsilon_text: Callable[[float], str],
) -> Line:
    last = epsilon_text(points[-1][1])
    return Line(
        f"{name}, {last} at the end", points, css, f"{short} {last}", short, css == "pooled"
    )


def sampling_facts(section: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How sites are sampled and how the clipping bound adapts, as rows of facts (text); none with the defaults."""
    rows = []
    rate, apart = number(section.get("sampling-rate")), number(section.get("min-separation"))
    if rate is not None and rate < 1:
        rows.append(
            (
                "who is asked",
                f"each site by a coin of its own, with a chance of {fmt.significant(rate)}; epsilon against the model's"
                " readers holds while none of them learns who was drawn: keep this report and the run directory from"
                " them; a bundle tells nothing of it",
            )
        )
    if apart is not None and apart > 1:
        rows.append(("who is asked", f"the sites take turns, each every {apart:g} rounds"))
    quantile = number(section.get("clipping-quantile"))
    if quantile is not None:
        rows.append(
            (
                "clipping bound follows",
                f"the length below which a share of {fmt.significant(quantile)} of the updates lies; their number has "
                "noise, and is in the epsilon",
            )
        )
    return rows
