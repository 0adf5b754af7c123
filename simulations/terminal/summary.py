"""Summary of a finished federation: the result by site as a table of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedge.simulations.terminal.text import (
    BELOW_NOISE_FLOOR,
    finite,
    lead_metric,
    member,
    metric_text,
    noised_text,
    printable,
    sparkline,
)

#: Sites up to which the table has a row for each; with more, this many of the weakest and the strongest.
MAX_SITES_SINGLY: Final = 12
EXTREMES: Final = 4
#: Lines about rounds in which a site is missing, and the width of a reason there.
MAX_ABSENCES: Final = 12
REASON_WIDTH: Final = 52
#: Largest epsilon that the server accepts from a site.
MAX_EPSILON: Final = 1e9


def _history(rounds: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[float]]:
    """Each site's values of a metric by round."""
    values_by_site: dict[str, list[float]] = {}
    for line in rounds:
        per_site = member(line, "metrics", "per_site")
        for site, values in per_site.items() if isinstance(per_site, Mapping) else ():
            if (value := finite(member(values, metric))) is not None:
                values_by_site.setdefault(site, []).append(value)
    return values_by_site


def _over_rounds(rounds: Sequence[Mapping[str, Any]], view: str, metric: str) -> list[float]:
    """A view's values of a metric, round by round."""
    by_round = (finite(member(line, "metrics", view, metric)) for line in rounds)
    return [value for value in by_round if value is not None]


def _examples(rounds: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The examples that each site trained on when its update last counted."""
    counts: dict[str, int] = {}
    for line in rounds:
        examples = line.get("examples")
        if isinstance(examples, Mapping):
            counts.update({s: int(n) for s, n in examples.items() if finite(n) is not None})
    return counts


def _missing(
    rounds: Sequence[Mapping[str, Any]], evaluated: Mapping[str, Any], history: Mapping[str, Any]
) -> list[str]:
    """Sites of the run that are not in the last evaluation; disconnected ones are known by their rejections."""
    expected = dict.fromkeys(history)
    for line in rounds:
        for key in ("invited", "trained"):
            expected.update(dict.fromkeys(s for s in line.get(key) or () if isinstance(s, str)))
        for item in line.get("rejected") or ():
            if member(item, "outcome") == "absent" and isinstance(
                site := member(item, "site"), str
            ):
                expected[site] = None
    return [site for site in expected if site not in evaluated]


def absences(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on the first rounds in which a site is missing: the expected sites, the missing ones, and why."""
    text = []
    for line in rounds:
        invited = {s for s in line.get("invited") or () if isinstance(s, str)}
        trained = {s for s in line.get("trained") or () if isinstance(s, str)}
        why: dict[str, str] = {}
        for item in line.get("rejected") or ():
            site, outcome = member(item, "site"), member(item, "outcome")
            if isinstance(site, str) and isinstance(outcome, str) and site not in trained:
                reason = str(member(item, "reason") or "")
                shown = f"{outcome}, {reason}" if outcome == "absent" else outcome
                why.setdefault(site, f"{printable(site)} {printable(shown, REASON_WIDTH)}")
        if not why:
            continue
        named = list(why.values())[:EXTREMES]
        if len(why) > len(named):
            named.append(f"{len(why) - len(named)} more")
        expected = len(invited | set(why))
        text.append(f"round {line.get('round')}: {len(trained)} of {expected} counted")
        text += [f"  {name}" for name in named]
    if len(text) <= MAX_ABSENCES:
        return text
    return [*text[:MAX_ABSENCES], "… see the report for all rounds"]


def spent(rounds: Sequence[Mapping[str, Any]], unit: str) -> list[str]:
    """A line with the largest epsilons that the sites reported last; none where no site reported any.

    null stands for an unbounded epsilon: the server gets updates without noise.
    """
    latest: dict[str, tuple[float, float]] = {}
    deltas: set[float | None] = set()
    for line in rounds:
        charges = line.get("privacy")
        for site, values in charges.items() if isinstance(charges, Mapping) else ():
            consumers, server = (finite(member(values, key)) for key in ("consumers", "server"))
            if isinstance(values, Mapping) and values.get("server", 0) is None:
                server = math.inf
            if consumers is None or server is None:
                continue
            bounded = 0 <= server <= MAX_EPSILON or server == math.inf
            if 0 <= consumers <= MAX_EPSILON and bounded:
                latest[site] = consumers, server
                deltas.add(finite(member(values, "delta")))
    if not latest:
        return _run_epsilon(rounds, unit)
    largest = (max(values) for values in zip(*latest.values(), strict=True))
    # Decimals as `fedge privacy ledger` has them.
    to_consumers, to_server = (
        "unbounded" if v == math.inf else f"{v:.4f}" if v < 100_000 else f"{v:.4g}" for v in largest
    )
    # A run of an earlier fedge does not tell at which delta each site's is.
    (delta,) = deltas if len(deltas) == 1 else (None,)
    at = "own deltas" if delta is None else f"delta {delta:g}"
    return [
        f"epsilon  readers {to_consumers}, server {to_server}, {at}, unit {unit or 'unknown'} "
        f"(largest of {len(latest)})"
    ]


def calibrated(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line on the final model's activation ranges; none where no site was asked for them."""
    calibration = rounds[-1].get("calibration") if rounds else None
    if not isinstance(calibration, Mapping):
        return []
    sites, reason = (
        finite(calibration.get("sites")),
        printable(str(calibration.get("reason") or ""), 60),
    )
    if calibration.get("ranges") is not True or sites is None:
        return [f"not calibrated: {reason}"]
    return [f"calibrated over {sites:.0f} site{'' if sites == 1 else 's'}"]


def _run_epsilon(rounds: Sequence[Mapping[str, Any]], unit: str) -> list[str]:
    """A line with the epsilon of this run alone, which the server computes for noise under secure aggregation."""
    for line in reversed(rounds):
        accounted = line.get("masked_epsilon")
        epsilon, delta = (finite(member(accounted, key)) for key in ("consumers", "delta"))
        if epsilon is not None and delta is not None and 0 <= epsilon <= MAX_EPSILON:
            return [
                f"epsilon  {epsilon:.4f}, delta {delta:g}, unit {unit or 'unknown'}: this run alone, either reader"
            ]
    return []


@dataclass(frozen=True)
class _Columns:
    """Layout of the table.

    Attributes:
        lead: the metric shown first.
        final: the last evaluation, with its record of noise.
        width: of the names.
    """

    lead: str
    final: Any
    width: int

    @property
    def noised(self) -> bool:
        """Whether metrics contain noise; no site reports its loss then."""
        return isinstance(member(self.final, "noise"), Mapping)

    @property
    def _wide(self) -> int:
        return 15 if self.noised else 9

    @property
    def _with_loss(self) -> bool:
        return not self.noised and self.lead != "loss"

    def head(self, *, by_round: bool) -> str:
        """The line above the rows."""
        text = (
            f"{'site':<{self.width}}  {'trained on':>10}  {printable(self.lead, 9):>{self._wide}}"
        )
        text += f"  {'loss':>8}" if self._with_loss else ""
        return text + ("  by round" if by_round else "")

    def row(self, name: str, count: str, values: Any, spark: str, *view: str) -> str:
        """One line; ``view`` is the path of its values in the evaluation."""
        shown = noised_text(self.lead, finite(member(values, self.lead)), self.final, *view)
        cells = f"{name:<{self.width}}  {count:>10}  {shown:>{self._wide}}"
        if self._with_loss:
            cells += f"  {metric_text('loss', finite(member(values, 'loss'))):>8}"
        return f"{cells}  {'' if shown == BELOW_NOISE_FLOOR else spark}".rstrip()


def _own_scale(values: Sequence[float]) -> str:
    return sparkline(values, min(values, default=0.0), max(values, default=1.0))


def _weakest_first(per_site: Mapping[str, Any], lead: str) -> list[str]:
    sign = -1.0 if lead == "loss" else 1.0

    def value(site: str) -> float:
        metric = finite(member(per_site, site, lead))
        return -math.inf if metric is None else sign * metric

    return sorted(per_site, key=value)


def summary_table(
    metrics: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], unit: str = ""
) -> str:
    """The result by site as text, at most 80 characters wide; with more than 12 sites the weakest and the strongest.

    Sites that are not in the last evaluation come after the others; then the epsilon that was spent, under
    differential privacy; rounds in which a site is missing, with the reason, come last.

    Args:
        metrics: as written to metrics.json.
        rounds: the lines of rounds.jsonl.
        unit: of privacy; empty where there is none.
    """
    final = member(metrics, "final")
    per_site, mean, pooled = (
        member(final, view) or {} for view in ("per_site", "site_mean", "pooled")
    )
    lead = lead_metric(mean or pooled)
    history, examples = _history(rounds, lead), _examples(rounds)
    every = [v for values in history.values() for v in values]
    low, high = min(every, default=0.0), max(every, default=1.0)
    names = list(per_site)
    cut = len(names) - 2 * EXTREMES if len(names) > MAX_SITES_SINGLY else 0
    if cut:
        names = _weakest_first(per_site, lead)
        names = [*names[:EXTREMES], *names[-EXTREMES:]]
    missing = _missing(rounds, per_site, history) if per_site else []
    few = len(names) + len(missing) <= MAX_SITES_SINGLY
    left_out = 0 if few else max(0, len(missing) - EXTREMES)
    missing = missing[: len(missing) - left_out]
    width = max([len("site mean"), *(len(printable(n)) for n in (*names, *missing))])
    columns = _Columns(lead, final, width)

    by_round = bool(every) or (bool(pooled) and (columns.noised or not mean))
    lines = [columns.head(by_round=by_round)]
    for index, name in enumerate(names):
        if cut and index == EXTREMES:
            lines.append(f"… {cut} sites in between")
        count, spark = str(examples.get(name, "–")), sparkline(history.get(name, []), low, high)
        lines.append(columns.row(printable(name), count, per_site[name], spark, "per_site", name))
    lines += [
        f"{printable(name):<{width}}  {examples.get(name, '–')!s:>10}  not evaluated"
        for name in missing
    ]
    if left_out:
        lines.append(f"… {left_out} more not evaluated")
    total = str(sum(examples.values())) if examples else ""
    pooled_spark = _own_scale(_over_rounds(rounds, "pooled", lead))
    if member(final, "noise", "unit") == "site":
        # Each site weighs the same, so that the mean and the pooled value are one.
        lines.append(columns.row("all sites", total, pooled, pooled_spark, "pooled"))
    else:
        # Under secure aggregation only the sum over all sites is known.
        if mean or not pooled:
            means = sparkline(_over_rounds(rounds, "site_mean", lead), low, high)
            lines.append(columns.row("site mean", "", mean, means, "site_mean"))
            pooled_spark = ""
        lines.append(columns.row("pooled", total, pooled, pooled_spark, "pooled"))
    return "\n".join([*lines, *spent(rounds, unit), *calibrated(rounds), *absences(rounds)])
