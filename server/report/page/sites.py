"""The report's section on each site's result at the end of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from statistics import quantiles

from fedge.server.report import format as fmt
from fedge.server.report import noised_figures as noise_figures
from fedge.server.report.axes import nice_ticks, tick_texts
from fedge.server.report.charts import Column, bar, column_chart, responsive, sparkline
from fedge.server.report.format import esc, metric_name, metric_value
from fedge.server.report.page.learning import MAX_SITES_SINGLY, axis_name, by_site, scaled
from fedge.server.report.records import Run

#: Rows of the weakest and of the strongest sites where there are more.
EXTREMES = 8
#: Sites that a sentence names: with the same result, and without one.
MAX_TIED = 3
MAX_NAMED = 12


def _listed(names: Sequence[str], limit: int) -> str:
    """``site-1, site-2``, and how many more; text, not escaped."""
    shown = [fmt.plain(name, 64) for name in names[:limit]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {fmt.count(more)} more" if more else "")


def with_value(measured: Mapping[str, float], value: float) -> str:
    """The sites whose result is exactly ``value``, the first three by name (text, not escaped)."""
    names = sorted((s for s, v in measured.items() if v == value), key=fmt.natural)
    return _listed(names, MAX_TIED)


def not_evaluated(run: Run) -> str:
    """A sentence that names the registered sites without a part in the last evaluation; empty where there are none."""
    missing = sorted(set(run.sites) - set(run.per_site), key=fmt.natural)
    if not missing or not run.per_site:
        return ""
    return f"Not evaluated in round {run.final_round}: {_listed(missing, MAX_NAMED)}."


def _site_rows(run: Run, names: Sequence[str], metrics: Sequence[str]) -> list[list[str]]:
    lead, noise = metrics[0], noise_figures.last(run)
    history = by_site(run.rounds, lead)
    every = [v for points in history.values() for _, v in points]
    low, high = min(every, default=0.0), max(every, default=1.0)
    greatest = max((v.get(lead, 0.0) for v in run.per_site.values()), default=1.0) or 1.0
    whole = 1.0 if fmt.is_share(lead) or lead in ("auc", "auroc", "f1") else greatest
    mark = run.site_mean[lead] / whole if lead in run.site_mean else None
    rows = []
    for name in names:
        values: Mapping[str, float] = run.per_site.get(name, {})
        site = run.sites.get(name)
        value = values.get(lead)
        shown = noise_figures.shown(lead, value, noise.site_stddev(name, lead))
        # A bar would show a figure that lies below the noise floor.
        clear = value is not None and not noise_figures.below_noise_floor(
            noise.site_stddev(name, lead)
        )
        value_bar = (
            bar(f"{name}: {shown}", value / whole, mark) if value is not None and clear else ""
        )
        row = [fmt.site_name(name), value_bar, f"<b>{shown}</b>"]
        row += [metric_value(m, values.get(m)) for m in metrics[1:]]
        row.append(
            sparkline(
                f"{name}: {metric_name(lead)} by round",
                [v for _, v in history.get(name, [])],
                low,
                high,
            )
        )
        for examples in (site.train_examples, site.test_examples) if site else (None, None):
            row.append(fmt.MISSING if examples is None else fmt.count(examples))
        rows.append(row)
    return rows


def histogram(values: Sequence[float], target: int = 10) -> list[tuple[float, float, int]]:
    """(low, high, how many) of bins between round numbers; the last includes its upper edge."""
    edges = nice_ticks(min(values), max(values), target)
    counts = [0] * (len(edges) - 1)
    for value in values:
        index = next((i for i in range(len(counts)) if value < edges[i + 1]), len(counts) - 1)
        counts[index] += 1
    return [(low, high, n) for (low, high), n in zip(pairwise(edges), counts, strict=True)]


def _spread_chart(run: Run, lead: str) -> str:
    bins = histogram([scaled(lead, v[lead]) for v in run.per_site.values() if lead in v])
    step = bins[0][1] - bins[0][0]
    edges = [b[0] for b in bins] + [bins[-1][1]]
    texts = tick_texts(edges)
    columns = [
        Column(
            (low + high) / 2, (float(n),), f"{texts[i]} to {texts[i + 1]}: {fmt.plural(n, 'site')}"
        )
        for i, (low, high, n) in enumerate(bins)
    ]
    keep = max(1, len(edges) // 7)
    ticks = [(e, t) for i, (e, t) in enumerate(zip(edges, texts, strict=True)) if i % keep == 0]
    draw = partial(
        column_chart,
        f"How many sites reach which {metric_name(lead)}",
        (axis_name(lead), "Sites"),
        columns,
        ("sent",),
        x_ticks=ticks,
        pitch=step,
    )
    return fmt.card(
        f"Sites by {metric_name(lead)}", responsive(lambda w, p: draw(width=w, phone=p))
    )


def _spread_facts(run: Run, lead: str) -> str:
    values = sorted(v[lead] for v in run.per_site.values() if lead in v)
    quarters = quantiles(values, n=4, method="inclusive")
    rows = [
        ("highest", values[-1]),
        ("a quarter of the sites is above", quarters[2]),
        ("half of the sites is above", quarters[1]),
        ("three quarters are above", quarters[0]),
        ("lowest", values[0]),
    ]
    facts = fmt.definitions((words, metric_value(lead, value)) for words, value in rows)
    return fmt.card(f"Spread of {metric_name(lead)}", facts, css="spread")


def site_results(run: Run) -> str:
    """The section with each site's metrics; empty before the first evaluation."""
    lead = run.lead
    measured = {s: v[lead] for s, v in run.per_site.items() if lead in v}
    if not measured:
        return ""
    others = sorted({m for v in run.per_site.values() for m in v} - {lead, "loss"})[:6]
    metrics = [lead, *(["loss"] if lead != "loss" else []), *others]
    head = [("site", ""), (metric_name(lead), "wide-bar"), ("", "n")]
    head += [(metric_name(m), "n") for m in metrics[1:]]
    head += [("by round", "spark-cell"), ("train examples", "n"), ("test examples", "n")]
    names = sorted(run.per_site, key=fmt.natural)
    best = sorted(
        measured, key=lambda s: (measured[s] if lead == "loss" else -measured[s], fmt.natural(s))
    )
    ranked = sorted(measured, key=lambda s: (measured[s], fmt.natural(s)))
    if lead == "loss":
        ranked.reverse()
    worst, top = measured[ranked[0]], measured[ranked[-1]]
    noise = noise_figures.last(run)
    hidden = [s for s in measured if noise_figures.below_noise_floor(noise.site_stddev(s, lead))]
    if hidden:
        lead_text = (
            f"Each site's own held-out examples after round {run.final_round}; at {len(hidden)} of {len(measured)} the "
            f"result is {noise_figures.WORDS}."
        )
    elif len(measured) == 1:
        lead_text = f"The held-out examples of {esc(ranked[0])} after round {run.final_round}."
    elif worst == top:
        lead_text = (
            f"Each site's own held-out examples after round {run.final_round}: "
            f"{metric_value(lead, top)} at each of the {len(measured)} sites."
        )
    else:
        lead_text = (
            f"Each site's own held-out examples after round {run.final_round}: from "
            f"{metric_value(lead, worst)} at {esc(with_value(measured, worst))} to "
            f"{metric_value(lead, top)} at {esc(with_value(measured, top))}. "
            "The line in the bars is the site mean."
        )
    if noise.unit:
        lead_text += f" Each has noise of its own; {noise_figures.SIGN}."
    lead_text += f" {esc(missing, 1000)}" if (missing := not_evaluated(run)) else ""
    if len(names) <= MAX_SITES_SINGLY:
        grid = fmt.table("Metrics of each site", head, _site_rows(run, names, metrics), css="sites")
        body = f'<div class="card">{grid}</div>'
    else:
        weak = fmt.table(
            "Weakest sites", head, _site_rows(run, ranked[:EXTREMES], metrics), css="sites"
        )
        strong = fmt.table(
            "Strongest sites", head, _site_rows(run, best[:EXTREMES], metrics), css="sites"
        )
        every = fmt.table(
            "Metrics of each site", head, _site_rows(run, names, metrics), css="sites", tall=True
        )
        spread = f"{_spread_chart(run, lead)}{_spread_facts(run, lead)}"
        body = "" if hidden else f'<div class="pair">{spread}</div>'
        body += fmt.card(f"The {EXTREMES} weakest sites", weak)
        body += fmt.card(f"The {EXTREMES} strongest sites", strong)
        body += f"<details class='card'><summary>All {len(names)} sites</summary>{every}</details>"
    return fmt.section("sites", "Result at each site", lead_text, body)
