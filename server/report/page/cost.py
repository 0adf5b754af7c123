"""The report's section on bytes and time."""

from __future__ import annotations

from functools import partial

from fedge.server.report import format as fmt
from fedge.server.report.charts import Column, column_chart, responsive
from fedge.server.report.records import Round, Run

#: Columns of a chart by round; with more rounds, neighbours share one.
MAX_COLUMNS = 80


def grouped(rounds: tuple[Round, ...], max_groups: int = MAX_COLUMNS) -> list[tuple[Round, ...]]:
    """At most ``max_groups`` groups of neighbouring rounds, all of the same size but perhaps the last."""
    each = -(-len(rounds) // max_groups) or 1
    return [rounds[i : i + each] for i in range(0, len(rounds), each)]


def _cost_charts(run: Run) -> str:
    groups = grouped(run.rounds)
    each = len(groups[0])
    largest = max(((r.sent or 0) + (r.received or 0) for r in run.rounds), default=0)
    divisor, unit = next(
        ((d, u) for d, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if largest >= d), (1.0, "B")
    )
    slow = max((r.seconds or 0 for r in run.rounds), default=0)
    per_second, time_unit = (1000.0, "ms") if slow < 1 else (1.0, "s")
    moved, spent = [], []
    for group in groups:
        n = len(group)
        middle = (group[0].number + group[-1].number) / 2
        name = (
            f"round {group[0].number}"
            if n == 1
            else f"rounds {group[0].number} to {group[-1].number}, mean"
        )
        sent, received = (
            sum(r.sent or 0 for r in group) / n,
            sum(r.received or 0 for r in group) / n,
        )
        seconds = sum(r.seconds or 0 for r in group) / n
        title = f"{name}: {fmt.size(sent)} sent, {fmt.size(received)} received"
        moved.append(Column(middle, (sent / divisor, received / divisor), title))
        spent.append(Column(middle, (seconds * per_second,), f"{name}: {fmt.duration(seconds)}"))
    means = f" One column is the mean of {each} rounds." if each > 1 else ""
    legend = (
        '<ul class="legend"><li><span class="key sent"></span>to the sites</li>'
        '<li><span class="key received"></span>from the sites</li></ul>'
    )
    cards = []
    if largest:
        label = f"Bytes moved by round: {fmt.size(run.sent)} to the sites, {fmt.size(run.received)} from them"
        draw = partial(
            column_chart,
            label,
            ("round", f"Moved ({unit})"),
            moved,
            ("sent", "received"),
            pitch=each,
        )
        note = f"{fmt.size(run.sent)} to the sites and {fmt.size(run.received)} from them in all.{means}"
        cards.append(
            fmt.card("Bytes moved", legend + responsive(lambda w, p: draw(width=w, phone=p)), note)
        )
    if slow:
        label = f"Time by round: {fmt.duration(run.seconds)} in all"
        draw_time = partial(
            column_chart, label, ("round", f"Time ({time_unit})"), spent, ("time",), pitch=each
        )
        note = f"{fmt.duration(run.seconds)} in all.{means}"
        cards.append(fmt.card("Time", responsive(lambda w, p: draw_time(width=w, phone=p)), note))
    return "".join(cards)


def cost(run: Run) -> str:
    """The section; empty where nothing was measured."""
    charts = _cost_charts(run) if run.rounds else ""
    return (
        fmt.section("cost", "What it cost", "", f'<div class="pair">{charts}</div>')
        if charts
        else ""
    )
