"""What the sites say to have spent, by round and reader, and its drawing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import ROUND_CEILING, Context
from functools import partial
from typing import Final, NamedTuple

from fedge.server.report import format as fmt
from fedge.server.report.charts import Band, Line, line_chart, responsive
from fedge.server.report.page.learning import MAX_SITES_SINGLY
from fedge.server.report.page.privacy_central import UNBOUNDED, by_round, reached
from fedge.server.report.records import Run

ROWS_OF_A_SHORT_TABLE: Final = 12
#: Largest epsilon that the server takes from a site; what is beyond is no figure.
MAX_EPSILON: Final = 1e9
#: From this ratio of the two readers' figures on, the smaller ones get a chart of their own.
FAR_APART: Final = 4.0


class Told(NamedTuple):
    """What has been spent by the end of a round, against the model's readers and against the server.

    The server's is infinite where it gets updates before the noise.
    """

    round: int
    consumers: float
    server: float


class Spent(NamedTuple):
    """What the sites say.

    Attributes:
        sites: figures by round of each site that gave any, sites in natural order.
        largest: over the sites, by round; what a site said last stands until it says more.
        lowest: likewise.
    """

    sites: Mapping[str, Sequence[Told]]
    largest: Sequence[Told]
    lowest: Sequence[Told]

    @property
    def same(self) -> bool:
        """Whether no figure differs between the two readers."""
        return all(t.consumers == t.server for told in self.sites.values() for t in told)


def spent(run: Run) -> Spent:
    """All figures of a run; a pair of which one is no epsilon is left out."""
    sites: dict[str, list[Told]] = {}
    latest: dict[str, Told] = {}
    largest, lowest = [], []
    for r in run.rounds:
        found = {
            site: Told(r.number, values["consumers"], values["server"])
            for site, values in r.privacy.items()
            if 0 <= values.get("consumers", -1.0) <= MAX_EPSILON
            and (0 <= values.get("server", -1.0) <= MAX_EPSILON or values.get("server") == math.inf)
        }
        latest |= found
        for site, told in found.items():
            sites.setdefault(site, []).append(told)
        if found:
            _, consumers, server = zip(*latest.values(), strict=True)
            largest.append(Told(r.number, max(consumers), max(server)))
            lowest.append(Told(r.number, min(consumers), min(server)))
    return Spent({s: sites[s] for s in sorted(sites, key=fmt.natural)}, largest, lowest)


def epsilon_text(value: float) -> str:
    """Three significant digits, rounded up: a bound must not read smaller than it is."""
    rounded = Context(prec=3, rounding=ROUND_CEILING).create_decimal(repr(value))
    return fmt.significant(float(rounded), zeros=True)


def _curves(found: Spent, index: int, css: str, name: str) -> list[Line]:
    """A reader's curves: sites thin where they are few, and the largest of them; ``index`` as in ``Told``."""
    few = 1 < len(found.sites) <= MAX_SITES_SINGLY
    lines = [
        Line(f"{site}, {name}", [(t.round, t[index]) for t in told], "site")
        for site, told in found.sites.items()
        if few
    ]
    points = [(t.round, t[index]) for t in found.largest]
    last = epsilon_text(points[-1][1])
    said, label = f"{name}, largest over the sites, {last} at the end", f"{name} {last}"
    # Rings let a line be seen that lies just below.
    ringed = css == "pooled"
    return [*lines, Line(said, points, css, label, name.removeprefix("model's "), ringed)]


def _chart(
    title: str, note: str, found: Spent, *readers: tuple[int, str, str], height: float = 260
) -> str:
    # The band of no height has the axis begin at 0.
    bands = [Band("", [(found.largest[0].round, 0.0, 0.0)], "")]
    if len(found.sites) > MAX_SITES_SINGLY:
        pairs = list(zip(found.lowest, found.largest, strict=True))
        # The larger first, and the smaller darker on top of it.
        for i, (index, _, name) in enumerate(reversed(readers)):
            points = [(float(a.round), a[index], b[index]) for a, b in pairs]
            css = "band inner" if i else "band"
            bands.append(Band(f"all sites, lowest to highest, {name}", points, css))
    lines = [line for reader in readers for line in _curves(found, *reader)]
    lines.sort(key=lambda line: line.label != "")
    said = "; ".join(line.name for line in lines if line.label)
    names = ("round", "Epsilon")
    draw = partial(line_chart, f"{title}: {said}", names, lines, bands, limits=(0, math.inf))
    drawn = responsive(lambda w, p: draw(width=w, phone=p, height=260 if p else height))
    return fmt.card(title, drawn, note)


def charts(run: Run, found: Spent) -> Iterator[str]:
    """Epsilon by round as cards: what the server reckons itself, or what the sites say."""
    if reached(run):
        yield by_round(run, epsilon_text)
        return
    if not found.largest:
        return
    title, consumers = "Epsilon by round", (1, "mean", "model's readers")
    note = (
        "In colour: the largest figure that a site tells; each is at its own site's delta."
        if len(found.sites) > 1
        else "One site tells it, at its own delta."
    )
    # With a long table beside it, as high as that.
    alone = 260 if len(found.sites) <= ROWS_OF_A_SHORT_TABLE else 430
    if len(found.sites) > MAX_SITES_SINGLY and found.same:
        note += " The band spans all sites."
    elif len(found.sites) > MAX_SITES_SINGLY:
        note += " The bands span all sites; the darker one is for the model's readers."
    elif len(found.sites) > 1:
        note += " A thin line is one site."
    last = found.largest[-1]
    if last.server == math.inf:
        note += f" Against the server epsilon is {UNBOUNDED}."
        yield _chart(title, note, found, consumers, height=alone)
        return
    if found.same:
        note += (
            " Both readers' figures are the same in every round, so one line stands for both: the server sees no more "
            "of who was drawn than they do."
        )
        yield _chart(title, note, found, (2, "mean", "both readers"), height=alone)
        return
    note += " Rings: against the server."
    if epsilon_text(last.consumers) == epsilon_text(last.server):
        note += " Both readers' lines end so close together that they read the same."
    far = last.server >= FAR_APART * last.consumers
    server = (2, "pooled", "server")
    yield _chart(title, note, found, consumers, server, height=260 if far else alone)
    if far:
        note = "The lower curves once more, on an axis of their own."
        yield _chart("Against the model's readers alone", note, found, consumers)
