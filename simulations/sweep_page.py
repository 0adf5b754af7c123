"""Renders a sweep as a self-contained HTML page in the style of a run's report, and as a table of text."""

from __future__ import annotations

from importlib import resources
from string import Template
from textwrap import fill
from typing import Final

from fedge.server.report import format as fmt
from fedge.server.report.format import esc, metric_name, metric_value
from fedge.server.report.page import sweep as drawing
from fedge.server.report.page.privacy_epsilon import epsilon_text
from fedge.server.report.page.sweep import EXACT, UNITS, Point, Sweep, words

_STYLE: Final = ".state.incomplete { background: var(--late); color: var(--late-text); }\n"
_MEANING: Final = {
    "What it shows": (
        "What the model loses by the noise, on the same task, division of the data and schedule.",
        "What one run costs: epsilon is what the ledgers of the simulated sites say after it, each with nothing "
        "charged before. At a real site a run adds to what the study has spent.",
    ),
    "What to mind": (
        EXACT + " Nothing here was released under differential privacy but the models.",
        "Whoever chooses the noise by a sweep has used the data in each of its runs, and in exact figures. Epsilon "
        "of the run that is chosen does not count that: sweep over public or made-up data, or over data that need "
        "no protection from whoever reads this page.",
        "A seed fixes the first weights and the division of the data, but not the noise: that is the operating "
        "system's, so that the same sweep comes out a little different.",
    ),
}  # fmt: skip


def render(sweep: Sweep, config: str, when: str) -> str:
    """Render the HTML page.

    Args:
        sweep: the results.
        config: the resolved configuration as TOML.
        when: date and time as text.
    """
    files = resources.files("fedge.server.report")
    style = files.joinpath("page.css").read_text(encoding="utf-8") + _STYLE
    failed = any(trial.value is None for trial in sweep.trials)
    links = {
        "sweep": "Accuracy and epsilon",
        "meaning": "How to read it",
        "origin": "Configuration",
    }
    return Template(files.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=esc(f"Sweep, {sweep.task}, {sweep.mechanism}"),
        style=style,
        headline=esc(words(sweep) + "."),
        run=esc(f"sweep of {sweep.task}, mechanism {sweep.mechanism}"),
        state="incomplete" if failed else "finished",
        when=f"<time>{esc(when)}</time>",
        nav="".join(f'<a href="#{n}">{t}</a>' for n, t in links.items()),
        body=_tiles(sweep) + _figures(sweep) + _meaning() + _origin(config),
    )


def _tiles(sweep: Sweep) -> str:
    base, failed = sweep.baseline.value, sum(t.value is None for t in sweep.trials)
    tiles = [
        fmt.tile(
            "Without noise",
            metric_value(sweep.metric, base),
            f"one run, seed {sweep.baseline.seed}",
        )
    ]
    ends = list(dict.fromkeys((*sweep.measured[-1:], *sweep.measured[:1])))
    names = ("Most noise", "Least noise") if len(ends) > 1 else ("With noise",)
    for name, p in zip(names, ends, strict=False):
        note = f"epsilon {epsilon_text(p.consumers or 0)}, noise multiplier {fmt.significant(p.noise_multiplier, 6)}"
        tiles.append(fmt.tile(name, metric_value(sweep.metric, p.mean), note))
    note = f"{failed} without a figure" if failed else fmt.plural(sweep.rounds, "round") + " each"
    tiles.append(fmt.tile("Runs", str(len(sweep.trials)), note, "bad" if failed else ""))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _figures(sweep: Sweep) -> str:
    lead = (
        f"The same configuration, trained under {fmt.plural(len(sweep.points), 'noise multiplier')} with "
        f"{fmt.plural(sweep.seeds, 'seed')} each, and once without noise. More noise is a smaller epsilon. "
        f"{metric_name(sweep.metric).capitalize()} is that of all sites' held-out examples together, after the last "
        "round."
    )
    pair = f'<div class="pair">{drawing.chart(sweep)}{drawing.table(sweep)}</div>'
    title = f"{metric_name(sweep.metric)} against epsilon".capitalize()
    return fmt.section("sweep", title, esc(lead, 1000), drawing.failures(sweep) + pair)


def _meaning() -> str:
    cards = [
        fmt.card(title, f"<ul>{''.join(f'<li>{esc(line, 1000)}</li>' for line in lines)}</ul>", css="brief")
        for title, lines in _MEANING.items()
    ]  # fmt: skip
    body = f'<div class="pair">{"".join(cards)}</div>'
    return fmt.section("meaning", "How to read it", "", body)


def _origin(config: str) -> str:
    lines = "\n".join(esc(line, 1000) for line in config.split("\n"))
    summary = "<summary>Configuration, resolved, less the noise multiplier</summary>"
    body = f'<details class="card">{summary}<pre tabindex="0">{lines}</pre></details>'
    return fmt.section("origin", "Configuration", "", body)


def table(sweep: Sweep) -> str:
    """The figures as text, at most 80 characters wide."""
    delta = "" if sweep.delta is None else f"delta {sweep.delta:g}"
    unit = UNITS.get(sweep.unit, "a unit of data")
    head = (
        f"{sweep.task}, {sweep.mechanism}, {fmt.plural(sweep.rounds, 'round')}, {fmt.plural(sweep.seeds, 'seed')}\n"
        f"epsilon of one run, for {unit}, {delta};\nthe largest over sites and seeds\n"
    )
    name = metric_name(sweep.metric)
    rows: list[tuple[str, ...]] = [
        ("noise", "epsilon,", "epsilon,", f"{name},"),
        ("multiplier", "readers", "server", "mean", "lowest", "highest"),
    ]
    base = metric_value(sweep.metric, sweep.baseline.value)
    rows.append(("none", "–", "–", base, "–", "–"))
    rows += [_row(sweep, p) for p in sweep.points]
    lines = [
        "  ".join(f"{cell.replace(fmt.THIN, ' '):>11}" for cell in row).rstrip() for row in rows
    ]
    failed = (f"{t.name}: {t.problem}" for t in sweep.trials if t.value is None)
    failures = "".join(f"{fill(line, 80, subsequent_indent='  ')}\n\n" for line in failed)
    return f"{head}\n" + "\n".join(lines) + f"\n\n{failures}{fill(EXACT, 80)}\n"


def _row(sweep: Sweep, p: Point) -> tuple[str, ...]:
    noise = fmt.significant(p.noise_multiplier, 6)
    if p.mean is None or p.consumers is None:
        return (noise, *("–",) * 5)
    server = "unbounded" if p.server is None else f"{p.server:.4f}"
    figures = (metric_value(sweep.metric, v) for v in (p.mean, p.lowest, p.highest))
    return (noise, f"{p.consumers:.4f}", server, *figures)
