"""The report's section on secure aggregation: what the server saw of it, in numbers and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from fedge.server.report import format as fmt
from fedge.server.report.charts import Column, column_chart, responsive
from fedge.server.report.format import MISSING, esc
from fedge.server.report.heatmap import greys, picture, range_text, scaled_bins
from fedge.server.report.json_values import number, sequence, whole
from fedge.server.report.records import Round, Run
from fedge.server.report.secure_data import EXCHANGES, Sum, sums

#: Rows of a table.
MAX_ROWS: Final = 1000
#: Sites of a group that are named.
MAX_NAMED: Final = 40
#: Reasons of evaluations that were not unmasked.
MAX_REASONS: Final = 5
#: Values of a vector that are drawn.
MAX_VALUES: Final = 1024
#: Masked values are spread over the ring.
RING: Final = 2.0**32

WORDS: Final = (
    (
        "Masked vector",
        "A site's update with random numbers added to every value, modulo 2^32. The sites chose the numbers such that "
        "they cancel in the sum.",
    ),
    (
        "Threshold",
        "How many sites had to stay until the end; with fewer the sum is not opened, and the server learns nothing.",
    ),
    ("Clipped", "A site's update was longer than the bound, and was scaled down to it."),
    ("Capped", "A site has more examples than the bound, and weighed as if it had no more."),
    ("Saturated", "A single value was larger than can be written down, and was cut off."),
)


def _smallest(rounds: Sequence[tuple[Round, Sum]]) -> int:
    """Number of sites in the smallest unmasked sum of updates; 0 where there is none."""
    return min((len(group) for _, s in rounds for group in s.groups), default=0)


def in_brief(run: Run) -> list[str]:
    """A line for the security officer (text); none where nothing was masked."""
    if not run.masked:
        return []
    rounds = sums(run)
    sizes = [_smallest(rounds), *(s.evaluated or 0 for _, s in rounds)]
    smallest = min((n for n in sizes if n), default=0)
    if not smallest:
        return ["Updates, metrics and counts were masked; no sum was opened."]
    return [
        f"Updates, metrics and counts arrived masked; only sums over {smallest} or more sites were opened."
    ]


def _evaluations(rounds: Sequence[tuple[Round, Sum]]) -> list[tuple[str, str]]:
    tried = [(r, s) for r, s in rounds if s.evaluated is not None]
    if not tried:
        return []
    sizes = [s.evaluated for _, s in tried if s.evaluated]
    over = f", over {min(sizes)} or more sites" if sizes else ""
    rows = [("evaluations opened", f"{len(sizes)} of {len(tried)}{over}")]
    failed = [
        f"round {r.number}: {esc(s.evaluation_reason)}" for r, s in tried if s.evaluation_reason
    ]
    if failed:
        more = f"<br>and {len(failed) - MAX_REASONS} more" if len(failed) > MAX_REASONS else ""
        rows.append(("evaluations not opened", "<br>".join(failed[:MAX_REASONS]) + more))
    return rows


def _facts(rounds: Sequence[tuple[Round, Sum]], *, exact: bool) -> str:
    """What was unmasked; ``exact`` where the counters have no noise."""
    unmasked = [s for _, s in rounds if s.groups]
    groups = max((len(s.groups) for s in unmasked), default=1)
    totals: Counter[str] = Counter()
    for s in unmasked:
        totals.update(s.counts)
    tried = sum(s.attempts for _, s in rounds)
    again = tried - sum(s.attempts > 0 for _, s in rounds)
    sent, received = (
        sum(getattr(r, way) or 0 for r, _ in rounds) / max(len(rounds), 1)
        for way in ("sent", "received")
    )
    rows = [
        (
            "sums of updates opened",
            f"{fmt.count(sum(len(s.groups) for s in unmasked))} in {fmt.plural(len(unmasked), 'round')}"
            + (f", {groups} groups in each" if groups > 1 else ""),
        ),
        ("fewest sites in one", str(_smallest(rounds)) if unmasked else MISSING),
        ("attempts", fmt.count(tried) + (f", {fmt.count(again)} of them again, with new keys" if again else "")),
        ("sites lost at an exchange", fmt.count(sum(len(s.dropouts) for _, s in rounds))),
        ("updates clipped", fmt.count(totals["clipped"])),
        ("sites capped", fmt.count(totals["capped"])),
        ("values saturated", fmt.count(totals["saturated"])),
        *_evaluations(rounds),
        ("bytes each way", f"{fmt.size(sent)} to the sites and {fmt.size(received)} from them a round"),
    ]  # fmt: skip
    note = (
        "Beside this the server saw who answered and when, signed keys, and sealed shares that it cannot open. "
        "It saw no update, no metric and no number of examples of a single site."
    )
    if exact:
        note += (
            " Counters are exact, so the difference of two rounds may still tell how many examples a site has that was "
            "in one of them only."
        )
    return fmt.card("What the server saw", fmt.definitions(rows), note)


def _exchanges(rounds: Sequence[tuple[Round, Sum]]) -> str:
    head = [("round", "n"), ("attempts", "n"), ("asked", "n"), ("keys", "n"), ("shares", "n")]
    head += [("masked vectors", "n"), ("signatures", "n"), ("opened by", "n"), ("threshold", "n")]
    head += [("clipped", "n"), ("capped", "n"), ("saturated", "n"), ("sent", "n"), ("received", "n")]  # fmt: skip
    rows = []
    tried = [(r, s) for r, s in rounds if s.attempts]
    for r, s in tried[-MAX_ROWS:]:
        row = [str(r.number), str(s.attempts)]
        if s.groups:
            row += [str(n) for n in s.answered().values()]
            row += [MISSING if s.threshold is None else str(s.threshold)]
            row += [fmt.count(s.counts[name]) for name in ("clipped", "capped", "saturated")]
        else:
            row += [str(len(r.invited)), *[MISSING] * (len(EXCHANGES) + 4)]
        rows.append([*row, fmt.size(r.sent), fmt.size(r.received)])
    cut = len(tried) - len(rows)
    note = "How many sites answered each exchange of the attempt that was opened."
    note += f" The first {fmt.plural(cut, 'round')} are left out here." if cut else ""
    grid = fmt.table("Sites by exchange", head, rows, tall=len(rows) > 12)
    return fmt.card("Sites by exchange", grid, note)


def _dropouts(rounds: Sequence[tuple[Round, Sum]]) -> str:
    every = [dropout for _, s in rounds for dropout in (*s.dropouts, *s.evaluation_dropouts)]
    if not every:
        return ""
    head = [("round", "n"), ("sum of", ""), ("attempt", "n"), ("site", ""), ("lost at", "")]
    head.append(("reason", "words"))
    rows = [
        [
            str(x.round),
            x.kind,
            str(x.attempt),
            fmt.site_name(x.site),
            esc(x.exchange, 40),
            esc(x.reason) or MISSING,
        ]
        for x in every[:MAX_ROWS]
    ]
    note = f"The first {len(rows)} of {fmt.count(len(every))}." if len(every) > len(rows) else ""
    grid = fmt.table("Sites lost on the way", head, rows, tall=len(rows) > 12)
    return fmt.card("Lost on the way", grid, note)


def _groups(rounds: Sequence[tuple[Round, Sum]]) -> str:
    """The sites of each group in the last round, where there is more than one group."""
    r, s = next(((r, s) for r, s in reversed(rounds) if s.groups), (None, None))
    if r is None or s is None or len(s.groups) < 2:
        return ""
    rows = []
    for i, group in enumerate(s.groups, 1):
        more = f" and {len(group) - MAX_NAMED} more" if len(group) > MAX_NAMED else ""
        names = ", ".join(fmt.site_name(site) for site in group[:MAX_NAMED])
        rows.append((f"group {i}", f"{names}{more}"))
    note = "Each group's sum was opened by itself, and the strategy compared the sums."
    return fmt.card(f"Groups of round {r.number}", fmt.definitions(rows), note)


def _values(seen: Mapping[str, Any], key: str) -> list[float]:
    values = map(number, sequence(seen.get(key))[:MAX_VALUES])
    return [v for v in values if v is not None]


def _picture_card(
    title: str,
    note: str,
    values: Sequence[float],
    ends: tuple[float, float],
    names: Sequence[str],
    axis: str,
) -> str:
    """Values between two ends, ``names`` being those of low end, middle and high end."""
    low, high = ends
    label = f"{title}: {fmt.plural(len(values), 'value')} as shades of grey"
    bins = scaled_bins(values, low, high)
    columns = [
        Column(i + 0.5, (float(n),), f"{fmt.plural(n, 'value')}, {range_text(i, len(bins), low, high)}")
        for i, n in enumerate(bins)
    ]  # fmt: skip
    ticks = list(zip((0.0, len(bins) / 2, float(len(bins))), names, strict=True))
    draw = partial(
        column_chart,
        f"{title}: how many values lie where",
        (axis, "Values"),
        columns,
        ("grey-bar",),
        height=150,
        x_ticks=ticks,
    )
    heatmap = picture(label, greys(values, low, high))
    return fmt.card(title, heatmap + responsive(lambda w, p: draw(width=w, phone=p)), note)


def _pictures(run: Run) -> str:
    masked, unmasked = _values(run.seen, "masked"), _values(run.seen, "opened")
    if not masked or not unmasked:
        return ""
    last = whole(run.seen.get("round"))
    suffix = f" of round {last}" if last is not None else ""
    largest = max(max(map(abs, unmasked)), 1e-12)
    left = _picture_card(
        f"One site's vector{suffix}, as it came",
        f"Its first {fmt.count(len(masked))} values: black is 0, white 2³² − 1. The masks are still on, and the server "
        "never had this vector without them.",
        masked,
        (0.0, RING),
        ("0", "2³¹", "2³²"),
        "Value, modulo 2³²",
    )
    right = _picture_card(
        f"The sum{suffix}, opened",
        f"The same values of the mean over the sites: mid-grey is no change of the parameter, black and white the "
        f"largest, {fmt.significant(largest)}. The masks have cancelled; no vector was opened by itself.",
        unmasked,
        (-largest, largest),
        (f"−{fmt.significant(largest)}", "0", fmt.significant(largest)),
        "Change of a parameter",
    )
    words = (
        "<p class='note'>The left picture should look like noise whatever the site has learnt. It illustrates and "
        "proves nothing: what the claim rests on is the protocol, which each site checks for itself.</p>"
    )
    return f'<div class="pair pictures">{left}{right}</div>{words}'


def secure(run: Run) -> str:
    """The section; empty where nothing was masked, or nothing was tried yet."""
    rounds = sums(run)
    if not run.masked or not rounds:
        return ""
    unmasked = sum(1 for _, s in rounds if s.groups)
    lead = (
        f"The sites masked what they sent. {fmt.plural(unmasked, 'round')} of {len(rounds)} gave a sum that the server "
        "could open, and only the sum."
    )
    body = (
        _pictures(run)
        + f'<div class="pair">{_facts(rounds, exact=not run.noise)}{_dropouts(rounds)}</div>'
    )
    return fmt.section("secure", "Masked sums", lead, body + _groups(rounds) + _exchanges(rounds))
