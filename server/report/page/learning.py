"""The report's section on learning: curves by round, and the numbers behind them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import quantiles

from fedge.server.report import format as fmt
from fedge.server.report import noised_figures as noise_figures
from fedge.server.report.charts import Band, Line, line_chart, responsive
from fedge.server.report.format import esc, metric_name, metric_value
from fedge.server.report.records import Round, Run

#: Sites up to which each has a curve and a row of its own.
MAX_SITES_SINGLY = 24
#: Rows of the table by round; the last ones are shown.
MAX_ROUND_ROWS = 1000


def scaled(metric: str, value: float) -> float:
    """The value in the unit of the axis."""
    return 100 * value if fmt.is_share(metric) else value


def axis_name(metric: str) -> str:
    """The name of a metric's axis, with its unit."""
    name = metric_name(metric)
    return name[:1].upper() + name[1:] + (" (%)" if fmt.is_share(metric) else "")


def by_site(rounds: Sequence[Round], metric: str) -> dict[str, list[tuple[float, float]]]:
    """Each site's (round, value) pairs of a metric, unscaled, sites in natural order."""
    series: dict[str, list[tuple[float, float]]] = {}
    for r in rounds:
        for site, values in r.per_site.items():
            if metric in values:
                series.setdefault(site, []).append((r.number, values[metric]))
    return {site: series[site] for site in sorted(series, key=fmt.natural)}


def _curve(rounds: Sequence[Round], which: str, metric: str) -> list[tuple[float, float]]:
    pairs = ((r.number, getattr(r, which).get(metric)) for r in rounds)
    return [(n, scaled(metric, v)) for n, v in pairs if v is not None]


def _bands(rounds: Sequence[Round], metric: str) -> list[Band]:
    """All sites from lowest to highest, and the middle half of them."""
    outer, inner = [], []
    for r in rounds:
        values = [scaled(metric, v[metric]) for v in r.per_site.values() if metric in v]
        if len(values) > 1:
            outer.append((float(r.number), min(values), max(values)))
            quarters = quantiles(values, n=4, method="inclusive")
            inner.append((float(r.number), quarters[0], quarters[2]))
    return [
        Band("all sites, lowest to highest", outer),
        Band("middle half of the sites", inner, "band inner"),
    ]


def _noise(run: Run, metric: str) -> list[tuple[float, float, float]]:
    """The pooled figure by round, plus and minus one standard deviation of its noise, clamped to [0, 1]."""
    points = []
    for r in run.rounds:
        value, stddev = (
            r.pooled.get(metric),
            noise_figures.round_noise(r).stddev("pooled", metric),
        )
        if value is not None and stddev is not None:
            ends = max(value - stddev, 0.0), min(value + stddev, 1.0)
            points.append((float(r.number), scaled(metric, ends[0]), scaled(metric, ends[1])))
    return points


def _last(run: Run, which: str, metric: str) -> str:
    """The last value of a curve (text)."""
    r = next(r for r in reversed(run.rounds) if metric in getattr(r, which))
    return noise_figures.shown(
        metric, getattr(r, which)[metric], noise_figures.round_noise(r).stddev(which, metric)
    )


def _metric_chart(run: Run, metric: str) -> str:
    sites = by_site(run.rounds, metric)
    lines: list[Line] = []
    bands: list[Band] = []
    if len(sites) > MAX_SITES_SINGLY:
        bands = _bands(run.rounds, metric)
    elif len(sites) > 1:
        lines = [
            Line(site, [(n, scaled(metric, v)) for n, v in points], "site")
            for site, points in sites.items()
        ]
    for which, name in (("site_mean", "site mean"), ("pooled", "pooled")):
        points = _curve(run.rounds, which, metric)
        if points:
            last = _last(run, which, metric)
            css = "mean" if which == "site_mean" else "pooled"
            said, ringed = f"{name}, {last} at the end", which == "pooled"
            lines.append(Line(said, points, css, f"{name} {last}", name, ringed))
    if not any(line.label for line in lines):
        return ""
    if spans := _noise(run, metric):
        bands = [Band("one standard deviation of the noise either way", spans)]
    said = "; ".join(line.name for line in lines if line.label)
    draw = partial(
        line_chart,
        f"{axis_name(metric)} by round: {said}",
        ("round", axis_name(metric)),
        lines,
        bands,
        limits=(0, 100) if fmt.is_share(metric) else None,
    )
    if noise_figures.last(run).unit:
        figure = "all sites, each alike" if noise_figures.sites_alike(run) else "the pooled figure"
        note = f"The counts have noise. The band around {figure} spans one standard deviation of it either way"
        end = noise_figures.last(run).stddev("pooled", metric)
        note += f"; at the end {noise_figures.shown(metric, run.pooled.get(metric), end)}."
        note += " A thin line is one site, with more noise than that." if len(sites) > 1 else ""
    elif bands:
        note = "The light band spans all sites, the darker one the middle half of them; rings mark all examples pooled."
    elif len(sites) > 1:
        note = "A thin line is one site; rings mark all examples pooled."
    else:
        note = ""
    return fmt.card(
        f"{axis_name(metric)} by round", responsive(lambda w, p: draw(width=w, phone=p)), note
    )


def _loss_chart(run: Run) -> str:
    lines = []
    for which, name, css in (
        ("train", "training", "train"),
        ("pooled" if run.masked else "site_mean", "evaluation", "evaluation"),
    ):
        points = _curve(run.rounds, which, "loss")
        if points:
            last = metric_value("loss", points[-1][1])
            lines.append(Line(f"{name}, {last} at the end", points, css, f"{name} {last}", name))
    if not lines:
        return ""
    draw = partial(
        line_chart,
        "Loss by round: " + "; ".join(line.name for line in lines),
        ("round", "Loss"),
        lines,
        limits=(0, float("inf")),
    )
    whom = "all sites' together" if run.masked else "mean over sites"
    note = f"Training: at the sites while they learn. Evaluation: on examples held out, {whom}."
    return fmt.card("Loss by round", responsive(lambda w, p: draw(width=w, phone=p)), note)


def _round_table(run: Run) -> str:
    views = [r.pooled if run.masked else r.site_mean for r in run.rounds]
    metrics = [m for m in (run.lead, "loss") if any(m in values for values in views)]
    metrics = list(dict.fromkeys(metrics))
    means = [] if run.masked else metrics
    head = [
        ("round", "n"),
        ("outcome", ""),
        ("trained", "n"),
        ("not counted", "n"),
        ("training loss", "n"),
    ]
    head += [(f"{metric_name(m)}, site mean", "n") for m in means]
    head += [(f"{metric_name(m)}, pooled", "n") for m in metrics]
    head += [("time", "n"), ("sent", "n"), ("received", "n")]
    rows = []
    for r in run.rounds[-MAX_ROUND_ROWS:]:
        outcome = (
            "new model" if r.committed else f"skipped{': ' if r.reason else ''}{esc(r.reason)}"
        )
        row = [
            str(r.number),
            outcome,
            f"{len(r.trained)} of {len(r.invited)}",
            str(len(r.rejected)),
        ]
        row.append(metric_value("loss", r.train.get("loss")))
        noise = noise_figures.round_noise(r)
        row += [
            noise_figures.shown(m, r.site_mean.get(m), noise.stddev("site_mean", m)) for m in means
        ]
        row += [noise_figures.shown(m, r.pooled.get(m), noise.stddev("pooled", m)) for m in metrics]
        rows.append([*row, fmt.duration(r.seconds), fmt.size(r.sent), fmt.size(r.received)])
    cut = len(run.rounds) - len(rows)
    note = (
        f"<p class='note'>The first {fmt.plural(cut, 'round')} are left out here.</p>"
        if cut
        else ""
    )
    grid = fmt.table("Numbers by round", head, rows, tall=True)
    return f"<details class='card'><summary>Numbers by round</summary>{note}{grid}</details>"


def learning(run: Run) -> str:
    """The section with the curves; empty before the first round."""
    if not run.rounds:
        return ""
    charts = [_metric_chart(run, run.lead) if run.lead != "loss" else "", _loss_chart(run)]
    skipped = [r for r in run.rounds if not r.committed]
    lead = f"{fmt.plural(len(run.rounds) - len(skipped), 'round')} made a new model"
    lead += (
        f", {len(skipped)} {'was' if len(skipped) == 1 else 'were'} skipped." if skipped else "."
    )
    grid = f'<div class="pair">{"".join(charts)}</div>'
    return fmt.section("learning", "Learning", lead, grid + _round_table(run))
