"""Accuracy against epsilon: the results of a sweep over noise multipliers, as ``fedge sweep`` writes sweep.json.

The file is read leniently, like everything that the report shows: invalid values are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedge.server.report import format as fmt
from fedge.server.report.charts import Band, Line, line_chart, responsive
from fedge.server.report.format import MISSING, esc, metric_name, metric_value
from fedge.server.report.json_values import mapping, number, sequence, text
from fedge.server.report.page.learning import axis_name, scaled
from fedge.server.report.page.privacy_epsilon import MAX_EPSILON, epsilon_text
from fedge.server.report.records import Run

#: Points of a sweep that are shown, runs of a point, and runs that failed.
MAX_POINTS: Final = 100
MAX_RUNS: Final = 1000
MAX_FAILED: Final = 50
#: A smaller epsilon has no place on a logarithmic axis.
MIN_EPSILON: Final = 1e-9
#: Labels of the axis of epsilon, on a wide page and on a phone.
_TICKS: Final = {False: 8, True: 6}
#: The unit of privacy in words.
UNITS: Final = {"example": "one training example", "site": "a whole site"}
EXACT: Final = (
    "Figures of a sweep are exact: counts over held-out examples without noise, which epsilon does not cover. They "
    "are for choosing the noise on data that is the researcher's own."
)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. ``value`` is None where it failed, and ``problem`` then says why."""

    id: str
    name: str
    seed: int
    value: float | None
    problem: str


@dataclass(frozen=True)
class Point:
    """A noise multiplier: the largest epsilon of its runs, and their mean, lowest and highest figure.

    All of them are None where every run failed; ``server`` also where nothing bounds what the server learns.
    """

    noise_multiplier: float
    consumers: float | None
    server: float | None
    mean: float | None
    lowest: float | None
    highest: float | None
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Sweep:
    """A sweep; ``points`` by ascending noise multiplier."""

    task: str
    mechanism: str
    unit: str
    delta: float | None
    metric: str
    rounds: int
    seeds: int
    baseline: Trial
    points: tuple[Point, ...]

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All runs, the one without noise first."""
        return (self.baseline, *(trial for point in self.points for trial in point.trials))

    @property
    def measured(self) -> tuple[Point, ...]:
        """Points with a figure."""
        return tuple(p for p in self.points if p.mean is not None)

    @property
    def unbounded(self) -> bool:
        """Whether nothing bounds what the server learns."""
        return bool(self.measured) and all(p.server is None for p in self.measured)

    @property
    def same(self) -> bool:
        """Whether epsilon is the same for both adversaries."""
        return all(p.consumers == p.server for p in self.measured)


def parse(values: Mapping[str, Any]) -> Sweep | None:
    """Parse the content of sweep.json; None where it is no sweep."""
    points = [
        p for p in map(_point, map(mapping, sequence(values.get("points"))[:MAX_POINTS])) if p
    ]
    metric = text(values.get("metric"))
    if not metric or not points:
        return None
    return Sweep(
        text(values.get("task")) or "a task",
        text(values.get("mechanism")),
        text(values.get("unit")),
        number(values.get("delta")),
        metric,
        int(number(values.get("rounds")) or 0),
        len(sequence(values.get("seeds"))),
        _trial(mapping(values.get("baseline"))),
        tuple(sorted(points, key=lambda p: p.noise_multiplier)),
    )


def _trial(values: Mapping[str, Any]) -> Trial:
    value = number(values.get("value"))
    problem = text(values.get("problem")) or ("" if value is not None else "no figure")
    seed = int(number(values.get("seed")) or 0)
    return Trial(text(values.get("id")), text(values.get("run")), seed, value, problem)


def _point(values: Mapping[str, Any]) -> Point | None:
    noise, epsilon = number(values.get("noise_multiplier")), mapping(values.get("epsilon"))
    if noise is None:
        return None
    consumers, server = (
        value
        if (value := number(epsilon.get(reader))) is not None and 0 <= value <= MAX_EPSILON
        else None
        for reader in ("consumers", "server")
    )
    mean, lowest, highest = (number(values.get(key)) for key in ("mean", "lowest", "highest"))
    if mean is None or consumers is None:
        consumers = server = mean = lowest = highest = None
    trials = tuple(_trial(mapping(t)) for t in sequence(values.get("runs"))[:MAX_RUNS])
    return Point(noise, consumers, server, mean, lowest, highest, trials)


def log_ticks(low: float, high: float, max_ticks: int) -> list[float]:
    """Round numbers on a logarithmic axis that enclose ``low`` and ``high``, both above 0; two at least.

    They are 1, 2 and 5 times powers of ten where at most ``max_ticks`` suffice, else (every n-th) powers of ten.
    """
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    for digits in ((1, 2, 5), (1,)):
        every = [float(f"{d}e{k}") for k in range(first, last + 1) for d in digits]
        begin = max(i for i, v in enumerate(every) if v <= low)
        end = min(i for i, v in enumerate(every) if v >= high)
        ticks = every[begin : max(end, begin + 1) + 1]
        if len(ticks) <= max_ticks:
            return ticks
    step = math.ceil((len(ticks) - 1) / (max_ticks - 1))
    exponents = range(round(math.log10(ticks[0])), last + step + 1, step)
    ends = [float(f"1e{k}") for k in exponents]
    return ends[: next(i for i, v in enumerate(ends) if v >= high) + 1]


def _curve(sweep: Sweep, adversary: str, name: str, label: str, css: str) -> Line:
    """The points of an adversary with their error bars; ``label`` is shown, on phones its first word."""
    points: list[tuple[float, float]] = []
    spans: list[tuple[float, float, float]] = []
    figures = []
    for p in sweep.measured:
        epsilon: float | None = getattr(p, adversary)
        if epsilon is None or epsilon < MIN_EPSILON or p.mean is None:
            continue
        x = math.log10(epsilon)
        points.append((x, scaled(sweep.metric, p.mean)))
        figures.append(f"{metric_value(sweep.metric, p.mean)} at {epsilon_text(epsilon)}")
        if p.lowest is not None and p.highest is not None and p.lowest < p.highest:
            spans.append((x, scaled(sweep.metric, p.lowest), scaled(sweep.metric, p.highest)))
    title, short, ringed = f"{name}: {', '.join(figures)}", label.split()[0], css == "pooled"
    return Line(title, sorted(points), css, label, short, ringed, spans=spans)


def _lines(sweep: Sweep, run: str) -> list[Line]:
    """The curves, and a ring around the point of the run with this id; none where nothing can be drawn."""
    if sweep.same:
        lines = [_curve(sweep, "consumers", "Both readers", "both readers", "mean")]
    elif sweep.unbounded:
        lines = [_curve(sweep, "consumers", "Model's readers", "readers", "mean")]
    else:
        lines = [
            _curve(sweep, "consumers", "Model's readers", "readers", "mean"),
            _curve(sweep, "server", "Server", "server", "pooled"),
        ]
    lines = [line for line in lines if line.points]
    if len(lines) == 1 and (own := _own(sweep, run)):
        noise, trial = own
        at = next((p.consumers for p in sweep.measured if p.noise_multiplier == noise), None)
        if at is not None and at >= MIN_EPSILON and trial.value is not None:
            point = (math.log10(at), scaled(sweep.metric, trial.value))
            lines.append(Line("this run", [point], "pooled", ringed=True))
    return lines


def _own(sweep: Sweep, run: str) -> tuple[float | None, Trial] | None:
    """The noise multiplier (None: no noise) and the trial of the run with this id."""
    every: list[tuple[float | None, Trial]] = [(None, sweep.baseline)]
    every += [(p.noise_multiplier, t) for p in sweep.points for t in p.trials]
    return next(((noise, t) for noise, t in every if run and t.id == run), None)


def chart(sweep: Sweep, run: str = "") -> str:
    """The metric against epsilon as a card; empty where no run has a figure.

    Args:
        sweep: what to draw.
        run: id of a run whose point gets a ring.
    """
    lines = _lines(sweep, run)
    if not lines:
        return ""
    xs = [10**x for line in lines for x, _ in line.points]
    axis = axis_name(sweep.metric)
    title = f"{metric_name(sweep.metric)} against epsilon".capitalize()
    base = sweep.baseline.value
    said = " ".join(line.name + "." for line in lines if line.label)
    if base is not None:
        said += f" Without noise {metric_value(sweep.metric, base)}."

    def draw(width: float, phone: bool) -> str:
        ticks = log_ticks(min(xs), max(xs), _TICKS[phone])
        ends = math.log10(ticks[0]), math.log10(ticks[-1])
        drawn = list(lines)
        if base is not None:
            level = scaled(sweep.metric, base)
            label = f"no noise {metric_value(sweep.metric, base)}"
            across = [(x, level) for x in ends]
            drawn.insert(0, Line("without noise", across, "train", label, "no noise", marked=False))
        # A band of no height has the axis reach from the first label to the last.
        level = lines[0].points[0][1]
        return line_chart(
            f"{title}, on a logarithmic axis of epsilon. {said}",
            ("epsilon (logarithmic)", axis),
            drawn,
            [Band("", [(x, level, level) for x in ends], "")],
            limits=(0, 100) if fmt.is_share(sweep.metric) else None,
            x_ticks=[(math.log10(t), fmt.significant(t)) for t in ticks],
            width=width,
            height=260 if phone else 300,
            phone=phone,
        )  # fmt: skip

    ringed = any(line.name == "this run" for line in lines)
    return fmt.card(title, responsive(draw), esc(_chart_note(sweep, ringed=ringed), 1500))


def _chart_note(sweep: Sweep, *, ringed: bool) -> str:
    unit = UNITS.get(sweep.unit, "a unit of data")
    delta = "" if sweep.delta is None else f", delta {fmt.significant(sweep.delta)}"
    note = f"Epsilon of one run, for {unit}{delta}; the largest over the sites"
    if sweep.seeds > 1:
        note += f" and seeds. A point is the mean over {sweep.seeds} seeds, its bar their lowest to highest."
    else:
        note += ". A point is a single run, so there are no bars."
    if sweep.same:
        note += " It is the same for the model's readers and for the server."
    elif sweep.unbounded:
        note += (
            " It is for the model's readers; where sites are drawn by chance, for those who do not learn which. The "
            "server gets the updates before the noise, so that nothing bounds what it learns."
        )
    else:
        note += " Rings: against the server."
    if sweep.baseline.value is not None:
        note += " Dashes: one run without noise."
    if any((p.consumers or 0) < MIN_EPSILON for p in sweep.measured):
        note += " An epsilon of 0 has no place on this axis; the table has it."
    return note + (" The orange ring is this run." if ringed else "")


def table(sweep: Sweep) -> str:
    """The figures as a card: a row without noise, then one for each noise multiplier."""
    metric = sweep.metric
    # A second column would repeat the first.
    columns = ["epsilon"] if sweep.same else ["epsilon, readers", "epsilon, server"]
    base = metric_value(metric, sweep.baseline.value)
    rows = [["none", *(MISSING,) * len(columns), base, *(MISSING,) * 2]]
    for p in sweep.points:
        server = "unbounded" if p.mean is not None and p.server is None else _epsilon(p.server)
        epsilons = (_epsilon(p.consumers), server)[: len(columns)]
        figures = (metric_value(metric, v) for v in (p.mean, p.lowest, p.highest))
        rows.append([fmt.significant(p.noise_multiplier, 6), *epsilons, *figures])
    head = [(name, "n") for name in ("noise", *columns, "mean", "lowest", "highest")]
    title = f"{metric_name(metric)} by noise multiplier".capitalize()
    return fmt.card(title, fmt.table(title, head, rows, tall=len(rows) > 16), esc(EXACT))


def _epsilon(value: float | None) -> str:
    return MISSING if value is None else epsilon_text(value)


def failures(sweep: Sweep) -> str:
    """A card that lists the runs without a figure; empty where all have one."""
    failed = [trial for trial in sweep.trials if trial.value is None]
    if not failed:
        return ""
    items = [f"<li><code>{esc(t.name, 64)}</code>: {esc(t.problem)}</li>" for t in failed]
    if len(items) > MAX_FAILED:
        items = [*items[:MAX_FAILED], f"<li>and {len(failed) - MAX_FAILED} more</li>"]
    words = fmt.plural(len(failed), "run")
    return (
        f'<div class="card warn"><h3>{words} without a figure</h3><ul>{"".join(items)}</ul></div>'
    )


def words(sweep: Sweep) -> str:
    """The result as a sentence without its full stop (text): with most noise, with least, and without."""
    ends: Sequence[Point] = sorted(sweep.measured, key=lambda p: p.consumers or 0)
    parts = [
        f"{metric_value(sweep.metric, p.mean)} at epsilon {epsilon_text(p.consumers or 0)}"
        for p in dict.fromkeys((*ends[:1], *ends[-1:]))
    ]
    if sweep.baseline.value is not None:
        parts.append(f"{metric_value(sweep.metric, sweep.baseline.value)} without noise")
    if not parts:
        return "No run of the sweep has a figure"
    name = metric_name(sweep.metric)
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{name[:1].upper()}{name[1:]} is {listed}"


def sweep(run: Run) -> str:
    """The section of a run's report; empty where the run belongs to no sweep."""
    parsed = parse(run.sweep)
    if parsed is None:
        return ""
    lead = f"{words(parsed)}. This run is one of the {len(parsed.trials)} of a sweep"
    if own := _own(parsed, run.name):
        noise, trial = own
        setting = (
            "without noise" if noise is None else f"noise multiplier {fmt.significant(noise, 6)}"
        )
        lead += f": {setting}, seed {trial.seed}"
    body = f'{failures(parsed)}<div class="pair">{chart(parsed, run.name)}{table(parsed)}</div>'
    return fmt.section("sweep", "Accuracy against epsilon", esc(lead + ".", 1000), body)
