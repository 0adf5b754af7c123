"""Epsilon that the sites report as spent, by round and adversary, and its charts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import ROUND_CEILING, Context
from functools import partial
from typing import Final, NamedTuple

from fedge.server.report import format as fmt
from fedge.server.report.charts import Band, Line, line_chart, responsive
from fedge.server.report.page.learning import MAX_SITES_SINGLY
from fedge.server.report.page.privacy_central import UNBOUNDED, by_round, run_epsilons
from fedge.server.report.records import Run

SHORT_TABLE_ROWS: Final = 12
#: Largest epsilon that the server accepts from a site; a larger value is ignored.
MAX_EPSILON: Final = 1e9
#: From this ratio of the two adversaries' figures on, the smaller ones get a chart of their own.
FAR_APART: Final = 4.0


class RoundEpsilon(NamedTuple):
    """Epsilon spent by the end of a round, by adversary.

    Attributes:
        round: its number.
        consumers: against model consumers.
        server: against the server; infinite where it gets updates before the noise.
    """

    round: int
    consumers: float
    server: float


class Spent(NamedTuple):
    """Epsilon that the sites report.

    Attributes:
        sites: figures by round of each site that reports any, sites in natural order.
        largest: over the sites, by round; a site's last figure counts until it reports the next.
        lowest: over the sites, by round, in the same way.
        delta: at which all of them are; None where they differ, or where the run does not tell it, as an older one.
    """

    sites: Mapping[str, Sequence[RoundEpsilon]]
    largest: Sequence[RoundEpsilon]
    lowest: Sequence[RoundEpsilon]
    delta: float | None = None

    @property
    def at(self) -> str:
        """Words for their delta."""
        if self.delta is not None:
            return f"at delta {self.delta:g}"
        return "at its own delta" if len(self.sites) == 1 else "each at its own site's delta"

    @property
    def same(self) -> bool:
        """Whether all figures are the same for both adversaries."""
        return all(t.consumers == t.server for values in self.sites.values() for t in values)


def spent(run: Run) -> Spent:
    """All reported figures of a run; a pair with an invalid epsilon is left out."""
    sites: dict[str, list[RoundEpsilon]] = {}
    latest: dict[str, RoundEpsilon] = {}
    largest, lowest = [], []
    for r in run.rounds:
        reported = {
            site: RoundEpsilon(r.number, values["consumers"], values["server"])
            for site, values in r.privacy.items()
            if 0 <= values.get("consumers", -1.0) <= MAX_EPSILON
            and (0 <= values.get("server", -1.0) <= MAX_EPSILON or values.get("server") == math.inf)
        }
        latest |= reported
        for site, epsilon in reported.items():
            sites.setdefault(site, []).append(epsilon)
        if reported:
            _, consumers, server = zip(*latest.values(), strict=True)
            largest.append(RoundEpsilon(r.number, max(consumers), max(server)))
            lowest.append(RoundEpsilon(r.number, min(consumers), min(server)))
    deltas = {v.get("delta") for r in run.rounds for v in r.privacy.values()}
    (delta,) = deltas if len(deltas) == 1 else (None,)
    return Spent({s: sites[s] for s in sorted(sites, key=fmt.natural)}, largest, lowest, delta)


def epsilon_text(value: float) -> str:
    """Three significant digits, rounded up: a bound must not read smaller than it is."""
    rounded = Context(prec=3, rounding=ROUND_CEILING).create_decimal(repr(value))
    return fmt.significant(float(rounded), zeros=True)


def _curves(reported: Spent, index: int, css: str, name: str) -> list[Line]:
    """An adversary's curves: sites thin where they are few, and the largest; ``index`` of ``RoundEpsilon``."""
    few = 1 < len(reported.sites) <= MAX_SITES_SINGLY
    lines = [
        Line(f"{site}, {name}", [(t.round, t[index]) for t in values], "site")
        for site, values in reported.sites.items()
        if few
    ]
    points = [(t.round, t[index]) for t in reported.largest]
    last = epsilon_text(points[-1][1])
    title, label = f"{name}, largest over the sites, {last} at the end", f"{name} {last}"
    # Rings let a line be seen that lies just below.
    ringed = css == "pooled"
    return [*lines, Line(title, points, css, label, name.removeprefix("model's "), ringed)]


def _chart(
    title: str, note: str, reported: Spent, *adversaries: tuple[int, str, str], height: float = 260
) -> str:
    # The band of no height has the axis begin at 0.
    bands = [Band("", [(reported.largest[0].round, 0.0, 0.0)], "")]
    if len(reported.sites) > MAX_SITES_SINGLY:
        pairs = list(zip(reported.lowest, reported.largest, strict=True))
        # The larger first, and the smaller darker on top of it.
        for i, (index, _, name) in enumerate(reversed(adversaries)):
            points = [(float(a.round), a[index], b[index]) for a, b in pairs]
            css = "band inner" if i else "band"
            bands.append(Band(f"all sites, lowest to highest, {name}", points, css))
    lines = [line for adversary in adversaries for line in _curves(reported, *adversary)]
    lines.sort(key=lambda line: line.label != "")
    curves = "; ".join(line.name for line in lines if line.label)
    names = ("round", "Epsilon")
    draw = partial(line_chart, f"{title}: {curves}", names, lines, bands, limits=(0, math.inf))
    drawing = responsive(lambda w, p: draw(width=w, phone=p, height=260 if p else height))
    return fmt.card(title, drawing, note)


def charts(run: Run, reported: Spent) -> Iterator[str]:
    """Epsilon by round as cards: as the server computes it, or as the sites report it."""
    if run_epsilons(run):
        yield by_round(run, epsilon_text)
        return
    if not reported.largest:
        return
    title, consumers = "Epsilon by round", (1, "mean", "model's readers")
    note = (
        f"In colour: the largest figure that a site tells; {reported.at}."
        if len(reported.sites) > 1
        else f"One site tells it, {reported.at}."
    )
    # With a long table beside it, as high as that.
    alone = 260 if len(reported.sites) <= SHORT_TABLE_ROWS else 430
    if len(reported.sites) > MAX_SITES_SINGLY and reported.same:
        note += " The band spans all sites."
    elif len(reported.sites) > MAX_SITES_SINGLY:
        note += " The bands span all sites; the darker one is for the model's readers."
    elif len(reported.sites) > 1:
        note += " A thin line is one site."
    last = reported.largest[-1]
    if last.server == math.inf:
        note += f" Against the server epsilon is {UNBOUNDED}."
        yield _chart(title, note, reported, consumers, height=alone)
        return
    if reported.same:
        note += (
            " Both readers' figures are the same in every round, so one line stands for both: the server sees no more "
            "of who was drawn than they do."
        )
        yield _chart(title, note, reported, (2, "mean", "both readers"), height=alone)
        return
    note += " Rings: against the server."
    if epsilon_text(last.consumers) == epsilon_text(last.server):
        note += " Both readers' lines end so close together that they read the same."
    far = last.server >= FAR_APART * last.consumers
    server = (2, "pooled", "server")
    yield _chart(title, note, reported, consumers, server, height=260 if far else alone)
    if far:
        note = "The lower curves once more, on an axis of their own."
        yield _chart("Against the model's readers alone", note, reported, consumers)
