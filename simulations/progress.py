"""What a person sees while a federation runs: one bar on a terminal, a few plain lines elsewhere.

Everything goes to standard error, so that standard output stays free for results. Names and reasons come from
sites; they are printed without control characters and never read as markup.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import TracebackType
from typing import IO, Any, Final

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

#: Plain lines of a whole run, at most one for each of these parts of it.
PLAIN_LINES: Final = 5
BLOCKS: Final = "▁▂▃▄▅▆▇█"
#: Width of the table's widest line, of a site's name and of a sparkline, in characters.
TABLE_WIDTH: Final = 80
NAME_WIDTH: Final = 24
SPARK_WIDTH: Final = 20
#: Sites up to which the table has a row for each; with more, this many of the weakest and the strongest.
MAX_SITES_SINGLY: Final = 12
EXTREMES: Final = 4
#: Lines about rounds in which a site is missing, and the width of a reason there.
MAX_ABSENCES: Final = 12
REASON_WIDTH: Final = 52
#: Largest epsilon that the server takes from a site.
MOST_EPSILON: Final = 1e9
#: Standard deviation of noise beyond which a share between 0 and 1 says nothing.
LOST: Final = 0.25
LOST_TEXT: Final = "lost in noise"


def _printable(name: str, width: int = NAME_WIDTH) -> str:
    kept = "".join(c if c.isprintable() else "?" for c in name[: width + 1])
    return kept if len(kept) <= width else kept[: width - 1] + "…"


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _get(value: Any, *path: str) -> Any:
    """The member at ``path`` of nested objects, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def metric_text(name: str, value: float | None) -> str:
    """Accuracy in percent, anything else with three decimals, a dash where it was not measured."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.3f}"


def noised_text(name: str, value: float | None, metrics: Any, *view: str) -> str:
    """A metric with the standard deviation of its noise, where it has some, rounded up.

    Args:
        name: of the metric.
        value: None where it was not measured.
        metrics: what holds the figure, with what it says of noise.
        view: where the figure stands in it.
    """
    noise = _get(metrics, "noise")
    if value is None or not isinstance(noise, Mapping):
        return metric_text(name, value)
    deviation = _finite(_get(noise, *view, name))
    if deviation is None or not deviation <= LOST:
        return LOST_TEXT
    tenths = math.ceil(1000 * deviation - 1e-9)
    share = name.endswith("accuracy")
    spread = f"{tenths / 10:.1f}" if share else f"{tenths / 1000:.3f}"
    return f"{metric_text(name, value)} ± {spread}"


def lead_metric(site_mean: Any) -> str:
    """The metric shown first: accuracy where there is one, loss only where there is nothing else."""
    names = list(site_mean) if isinstance(site_mean, Mapping) else []
    if "accuracy" in names or not names:
        return "accuracy"
    return next((str(name) for name in names if name != "loss"), "loss")


def clock(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:03``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def round_facts(line: Mapping[str, Any]) -> str:
    """A line of rounds.jsonl in a few words: ``97.2 %  loss 0.081  8/8 sites  1 not counted``."""
    # Under masks no site's own metrics are known, so there is no mean of them.
    view = "site_mean" if _get(line, "metrics", "site_mean") else "pooled"
    mean = _get(line, "metrics", view)
    lead = lead_metric(mean)
    loss = _finite(_get(line, "metrics", "train", "loss"))
    parts = []
    if (value := _finite(_get(mean, lead))) is not None and lead != "loss":
        text = noised_text(lead, value, _get(line, "metrics"), view)
        plain = lead == "accuracy" and "%" in text
        parts.append(text if plain else f"{_printable(lead, 12)} {text}")
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    parts.append(f"{len(line.get('trained') or ())}/{len(line.get('invited') or ())} sites")
    if refused := len(line.get("rejected") or ()):
        parts.append(f"{refused} not counted")
    if line.get("outcome") != "committed":
        parts.append("skipped")
    return "  ".join(parts)


def waiting_text(phase: str, sites: Sequence[str], seconds: float) -> str:
    """``waiting for site-3 and 2 more (0:30)``."""
    if phase == "superlink":
        what = "the SuperLink"
    elif not sites:
        what = "sites to connect" if phase == "connect" else "sites"
    else:
        what = _printable(sites[0]) + (f" and {len(sites) - 1} more" if len(sites) > 1 else "")
        what += " to connect" if phase == "connect" else ""
    return f"waiting for {what} ({clock(seconds)})"


def sparkline(values: Sequence[float], low: float, high: float, width: int = SPARK_WIDTH) -> str:
    """Block characters, at most ``width``; where there are more values, the mean of neighbours."""
    if not values:
        return ""
    cells = min(width, len(values))
    edges = [round(i * len(values) / cells) for i in range(cells + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    span = high - low
    top = len(BLOCKS) - 1
    levels = (round((m - low) / span * top) if span > 0 else top for m in means)
    return "".join(BLOCKS[min(max(level, 0), top)] for level in levels)


class Progress:
    """The progress of one run, as a context manager.

    Args:
        quiet: print nothing.
        file: where to print, standard error where not given.
        terminal: force or forbid the bar; found out from ``file`` where not given.
    """

    def __init__(
        self, *, quiet: bool = False, file: IO[str] | None = None, terminal: bool | None = None
    ) -> None:
        self._file = file if file is not None else sys.stderr
        self._quiet = quiet
        self._console = Console(file=self._file, force_terminal=terminal, highlight=False)
        self._live = not quiet and self._console.is_terminal
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._begun = 0.0
        self._done = 0
        self._facts = ""
        self._last_part = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it stands, also where the run failed or was interrupted."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def start(self, total_rounds: int, done: int = 0) -> None:
        """Begin a run of ``total_rounds``, or go on after ``done`` of them."""
        self._total, self._done = max(1, total_rounds), done
        self._begun = time.monotonic()
        if not self._live:
            return
        narrow = self._console.width <= TABLE_WIDTH
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None if narrow else 40),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self._console,
            expand=narrow,
            refresh_per_second=8,
        )
        self._task = self._bar.add_task(
            f"round {done}/{self._total}", total=self._total, completed=done, facts="waiting"
        )
        self._bar.start()

    def site(self, server_round: int, site: str, done: int, total: int) -> None:  # noqa: ARG002
        """Note that ``done`` of ``total`` sites have answered in a round, ``site`` the last of them."""
        if self._bar is None or self._task is None:
            return
        share = min(done / total, 1.0) if total > 0 else 0.0
        facts = f"site {done}/{total}" + (f"  {self._facts}" if self._facts else "")
        self._bar.update(
            self._task,
            description=f"round {server_round}/{self._total}",
            completed=server_round - 1 + share,
            facts=facts,
        )

    def round(self, line: Mapping[str, Any]) -> None:
        """Show the round that just closed.

        Args:
            line: as written to rounds.jsonl.
        """
        number = int(line["round"])
        elapsed = time.monotonic() - self._begun
        left = (self._total - number) * elapsed / max(1, number - self._done)
        self._facts = round_facts(line)
        spent = f"{clock(elapsed)} left {clock(left)}" if number < self._total else clock(elapsed)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=f"round {number}/{self._total}",
                completed=number,
                facts=f"{self._facts}  {spent}",
            )
        elif not self._quiet:
            self._plain(number, spent)

    def sent(self, server_round: int, done: int, total: int, nbytes: int) -> None:
        """Show how many requests are out, where they go one by one."""
        if done < total:
            self._note(server_round, f"sent {done}/{total}, {nbytes / 1e6:.0f} MB", plain=False)

    def waiting(self, server_round: int, phase: str, sites: Sequence[str], seconds: float) -> None:
        """Show for whom, or what, the run waits."""
        self._note(server_round, waiting_text(phase, sites, seconds))

    def lost(self, server_round: int, site: str, seconds: float) -> None:  # noqa: ARG002
        """Name a site that is no longer connected."""
        self._note(server_round, f"{_printable(site)} is not connected")

    def back(self, server_round: int, site: str, seconds: float) -> None:
        """Name a site that is connected again."""
        self._note(server_round, f"{_printable(site)} is back after {clock(seconds)}")

    def _note(self, server_round: int, text: str, *, plain: bool = True) -> None:
        where = f"round {server_round}/{self._total}" if self._total else "start"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=where, facts=text)
        elif plain and not self._quiet:
            self._file.write(f"{where}  {text}\n")
            self._file.flush()

    def _plain(self, number: int, spent: str) -> None:
        """One line for each fifth of the run, at its end."""
        part = number * PLAIN_LINES // self._total
        if part > self._last_part:
            self._last_part = part
            self._file.write(f"round {number}/{self._total}  {self._facts}  {spent}\n")
            self._file.flush()


def _history(rounds: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[float]]:
    """Each site's values of a metric by round."""
    found: dict[str, list[float]] = {}
    for line in rounds:
        per_site = _get(line, "metrics", "per_site")
        for site, values in per_site.items() if isinstance(per_site, Mapping) else ():
            if (value := _finite(_get(values, metric))) is not None:
                found.setdefault(site, []).append(value)
    return found


def _over_rounds(rounds: Sequence[Mapping[str, Any]], view: str, metric: str) -> list[float]:
    """A view's values of a metric, round by round."""
    found = (_finite(_get(line, "metrics", view, metric)) for line in rounds)
    return [value for value in found if value is not None]


def _examples(rounds: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The examples that each site trained on when its update last counted."""
    found: dict[str, int] = {}
    for line in rounds:
        examples = line.get("examples")
        if isinstance(examples, Mapping):
            found.update({s: int(n) for s, n in examples.items() if _finite(n) is not None})
    return found


def _missing(
    rounds: Sequence[Mapping[str, Any]], evaluated: Mapping[str, Any], history: Mapping[str, Any]
) -> list[str]:
    """Sites of the run that are not in the last evaluation; those not connected are listed as absent only."""
    found = dict.fromkeys(history)
    for line in rounds:
        for key in ("invited", "trained"):
            found.update(dict.fromkeys(s for s in line.get(key) or () if isinstance(s, str)))
        for item in line.get("rejected") or ():
            if _get(item, "outcome") == "absent" and isinstance(site := _get(item, "site"), str):
                found[site] = None
    return [site for site in found if site not in evaluated]


def absences(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the rounds in which not everybody counted, the first few: who was expected, who was missing, and why."""
    told = []
    for line in rounds:
        invited = {s for s in line.get("invited") or () if isinstance(s, str)}
        trained = {s for s in line.get("trained") or () if isinstance(s, str)}
        why: dict[str, str] = {}
        for item in line.get("rejected") or ():
            site, outcome = _get(item, "site"), _get(item, "outcome")
            if isinstance(site, str) and isinstance(outcome, str) and site not in trained:
                reason = str(_get(item, "reason") or "")
                shown = f"{outcome}, {reason}" if outcome == "absent" else outcome
                why.setdefault(site, f"{_printable(site)} {_printable(shown, REASON_WIDTH)}")
        if not why:
            continue
        named = list(why.values())[:EXTREMES]
        if len(why) > len(named):
            named.append(f"{len(why) - len(named)} more")
        expected = len(invited | set(why))
        told.append(f"round {line.get('round')}: {len(trained)} of {expected} counted")
        told += [f"  {name}" for name in named]
    if len(told) <= MAX_ABSENCES:
        return told
    return [*told[:MAX_ABSENCES], "… see the report for all rounds"]


def spent(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line with the largest epsilons that the sites told last; none where nobody told any.

    null stands for a server that gets updates without noise: nothing bounds what it learns.
    """
    latest: dict[str, tuple[float, float]] = {}
    for line in rounds:
        told = line.get("privacy")
        for site, values in told.items() if isinstance(told, Mapping) else ():
            consumers, server = (_finite(_get(values, key)) for key in ("consumers", "server"))
            if isinstance(values, Mapping) and values.get("server", 0) is None:
                server = math.inf
            if consumers is None or server is None:
                continue
            bounded = 0 <= server <= MOST_EPSILON or server == math.inf
            if 0 <= consumers <= MOST_EPSILON and bounded:
                latest[site] = consumers, server
    if not latest:
        return _reckoned(rounds)
    largest = (max(values) for values in zip(*latest.values(), strict=True))
    # Decimals as `fedge privacy ledger` has them.
    to_readers, to_server = (
        "unbounded" if v == math.inf else f"{v:.4f}" if v < 100_000 else f"{v:.4g}" for v in largest
    )
    # Each site's is at its own delta, which it does not tell.
    told_by = f"{len(latest)} site{'' if len(latest) == 1 else 's'}"
    deltas = "own delta" if len(latest) == 1 else "own deltas"
    return [f"epsilon  readers {to_readers}, server {to_server} (largest of {told_by}, {deltas})"]


def _reckoned(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same of this run alone, where noise under masks lets the server reckon it."""
    for line in reversed(rounds):
        told = line.get("masked_epsilon")
        epsilon, delta = (_finite(_get(told, key)) for key in ("consumers", "delta"))
        if epsilon is not None and delta is not None and 0 <= epsilon <= MOST_EPSILON:
            return [
                f"epsilon  {epsilon:.4f} at delta {delta:g}, of this run alone, for either reader"
            ]
    return []


def summary_table(metrics: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    """The result by site as text, at most 80 wide; with more than 12 sites the weakest and the strongest.

    Sites of the run that the last evaluation lacks come after those that it has; then what was spent, under
    differential privacy; rounds that lacked a site, with the reason, come last.

    Args:
        metrics: as written to metrics.json.
        rounds: the lines of rounds.jsonl.
    """
    per_site, mean = (
        _get(metrics, "final", "per_site") or {},
        _get(metrics, "final", "site_mean") or {},
    )
    pooled = _get(metrics, "final", "pooled") or {}
    lead = lead_metric(mean or pooled)
    sign = -1.0 if lead == "loss" else 1.0
    history, examples = _history(rounds, lead), _examples(rounds)
    every = [v for values in history.values() for v in values]
    low, high = min(every, default=0.0), max(every, default=1.0)
    names = list(per_site)
    cut = len(names) - 2 * EXTREMES if len(names) > MAX_SITES_SINGLY else 0
    if cut:
        worst = -math.inf
        names.sort(
            key=lambda s: worst if (v := _finite(_get(per_site, s, lead))) is None else sign * v
        )
        names = [*names[:EXTREMES], *names[-EXTREMES:]]
    missing = _missing(rounds, per_site, history) if per_site else []
    few = len(names) + len(missing) <= MAX_SITES_SINGLY
    left_out = 0 if few else max(0, len(missing) - EXTREMES)
    missing = missing[: len(missing) - left_out]
    width = max([len("site mean"), *(len(_printable(n)) for n in (*names, *missing))])

    final = _get(metrics, "final")
    noised = isinstance(_get(final, "noise"), Mapping)
    # Under noise no site tells its loss.
    wide, with_loss = (15, False) if noised else (9, lead != "loss")

    def row(name: str, count: str, values: Any, spark: str = "", view: tuple[str, ...] = ()) -> str:
        shown = noised_text(lead, _finite(_get(values, lead)), final, *view)
        loss = _finite(_get(values, "loss"))
        cells = f"{name:<{width}}  {count:>10}  {shown:>{wide}}"
        if with_loss:
            cells += f"  {metric_text('loss', loss):>8}"
        return f"{cells}  {'' if shown == LOST_TEXT else spark}".rstrip()

    by_round = bool(every) or (bool(pooled) and (noised or not mean))
    head = f"{'site':<{width}}  {'trained on':>10}  {_printable(lead, 9):>{wide}}"
    lines = [head + (f"  {'loss':>8}" if with_loss else "") + ("  by round" if by_round else "")]
    for index, name in enumerate(names):
        if cut and index == EXTREMES:
            lines.append(f"… {cut} sites in between")
        count = str(examples[name]) if name in examples else "–"
        lines.append(
            row(
                _printable(name),
                count,
                per_site[name],
                sparkline(history.get(name, []), low, high),
                ("per_site", name),
            )
        )
    for name in missing:
        count = str(examples[name]) if name in examples else "–"
        lines.append(f"{_printable(name):<{width}}  {count:>10}  not evaluated")
    if left_out:
        lines.append(f"… {left_out} more not evaluated")
    total = str(sum(examples.values())) if examples else ""
    if _get(final, "noise", "unit") == "site":
        # Each site weighs the same, so that the mean and the pooled value are one.
        every = _over_rounds(rounds, "pooled", lead)
        spark = sparkline(every, min(every, default=0.0), max(every, default=1.0))
        lines.append(row("all sites", total, pooled, spark, ("pooled",)))
        return "\n".join([*lines, *spent(rounds), *absences(rounds)])
    if mean or not pooled:
        means = _over_rounds(rounds, "site_mean", lead)
        lines.append(row("site mean", "", mean, sparkline(means, low, high), ("site_mean",)))
        spark = ""
    else:
        # Masked: only the sum over all sites is known.
        every = _over_rounds(rounds, "pooled", lead)
        spark = sparkline(every, min(every, default=0.0), max(every, default=1.0))
    lines.append(row("pooled", total, pooled, spark, ("pooled",)))
    lines += spent(rounds)
    lines += absences(rounds)
    return "\n".join(lines)
