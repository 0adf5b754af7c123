"""The report's section on participation: a matrix of sites by rounds, and every reply that did not count."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from fedge.server.report import format as fmt
from fedge.server.report.format import esc
from fedge.server.report.json_values import mapping, number
from fedge.server.report.records import Refusal, Round, Run
from fedge.shared.error_catalogue import CATALOGUE

#: The last rounds and the sites that the matrix shows, and the rows of the table of refusals.
MAX_MATRIX_ROUNDS: Final = 150
MAX_MATRIX_SITES: Final = 300
MAX_REFUSAL_ROWS: Final = 500
#: Sites that one cell of the table of rounds names.
MAX_NAMED: Final = 8
#: Sites up to which every cell has a tooltip; with more, only those that need an explanation.
MAX_SITES_WITH_TIPS: Final = 40
#: Rounds up to which the matrix is narrow enough to stand beside the table.
MAX_ROUNDS_BESIDE: Final = 14


class State(NamedTuple):
    """The content of a cell: its style class, its sign, and the words of the legend."""

    css: str
    sign: str
    words: str


TRAINED: Final = State("ok", "✓", "trained")
NOTED: Final = State("ok noted", "✓", "trained, with a remark")
REJECTED: Final = State("rejected", "✕", "rejected")
LATE: Final = State("late", "L", "late")
NO_REPLY: Final = State("absent", "○", "absent")
ERROR: Final = State("error", "!", "error at the site")
OTHER: Final = State("late", "S", "stale or duplicate")
OPEN: Final = State("open", "?", "invited, no outcome recorded")
DISCONNECTED: Final = State("absent", "–", "not connected")
IDLE: Final = State("idle", "·", "not invited")
STATES: Final = (TRAINED, NOTED, REJECTED, LATE, NO_REPLY, ERROR, OTHER, OPEN, DISCONNECTED, IDLE)

_BY_OUTCOME: Final = {
    "rejected": REJECTED, "late": LATE, "absent": NO_REPLY, "error": ERROR, "stale": OTHER, "duplicate": OTHER,
}  # fmt: skip
#: Which of several refusals of one site in one round the cell shows.
_WEIGHT: Final = {"rejected": 0, "error": 1, "late": 2, "absent": 3, "stale": 4, "duplicate": 5}
#: Further outcomes that are counted, in this order after those.
_BESIDES: Final = ("not connected", "metric dropped")


def by_site(r: Round) -> dict[str, list[Refusal]]:
    """A round's refusals and dropped metrics, by site."""
    refusals: dict[str, list[Refusal]] = {}
    for refusal in (*r.rejected, *r.dropped):
        refusals.setdefault(refusal.site, []).append(refusal)
    return refusals


def cell(r: Round, site: str, refusals: Sequence[Refusal]) -> State:
    """The state of a site in a round; an update that counted outweighs any other reply of the site."""
    if site in r.trained:
        return NOTED if refusals else TRAINED
    ranked = sorted((x for x in refusals if x.outcome in _WEIGHT), key=lambda x: _WEIGHT[x.outcome])
    if ranked:
        return _BY_OUTCOME[ranked[0].outcome]
    if any(x.outcome != "metric dropped" for x in refusals):
        return REJECTED
    return OPEN if site in r.invited else IDLE


@lru_cache(maxsize=4)
def samples(config: str) -> bool:
    """Whether the run invites a share of the sites, so that one that was not invited may well be connected."""
    try:
        sections = mapping(tomllib.loads(config))
    except tomllib.TOMLDecodeError:
        return False
    chosen, private = mapping(sections.get("round")), mapping(sections.get("privacy"))
    for share in (number(chosen.get("fraction-train")), number(private.get("sampling-rate"))):
        if share is not None and share < 1:
            return True
    apart = number(private.get("min-separation"))
    return apart is not None and apart > 1


def unconnected(run: Run, r: Round) -> frozenset[str]:
    """Registered sites that were not connected in a round: one that invites all did not invite or record them."""
    if samples(run.config):
        return frozenset()
    recorded = {x.site for x in (*r.rejected, *r.dropped)}
    return frozenset(set(run.sites) - r.invited - r.trained - recorded)


def describe(refusal: Refusal) -> str:
    """A refusal in words: outcome, number, reason."""
    return " ".join(x for x in (f"{refusal.outcome}:", refusal.code, refusal.reason) if x)


def _cell_html(
    r: Round, site: str, refusals: Sequence[Refusal], disconnected: bool, tips: bool
) -> tuple[State, str]:
    state = DISCONNECTED if disconnected else cell(r, site, refusals)
    if refusals:
        tip = f"{site}, round {r.number}: {'; '.join(describe(x) for x in refusals[:5])}"
    elif tips and state is TRAINED and site in r.examples:
        tip = f"{site}, round {r.number}: trained on {fmt.plural(r.examples[site], 'example')}"
    elif tips or state in (OPEN, DISCONNECTED):
        tip = f"{site}, round {r.number}: {state.words}"
    else:
        tip = ""
    title = f' title="{esc(tip)}"' if tip else ""
    return state, f'<td class="{state.css}"{title}>{state.sign}</td>'


def _short(name: str) -> str:
    """A long name's beginning and end, as long names often differ in the end only."""
    return name if len(name) <= fmt.LONG_NAME else f"{name[:8]}…{name[-8:]}"


def _matrix(run: Run) -> str:
    rounds = run.rounds[-MAX_MATRIX_ROUNDS:]
    grouped = [by_site(r) for r in rounds]
    disconnected = [unconnected(run, r) for r in rounds]
    trouble = Counter(
        site for group in grouped for site, refusals in group.items() for _ in refusals
    )
    trouble.update(site for missing in disconnected for site in missing)
    names = sorted(set(run.sites) | set(trouble), key=fmt.natural)
    words = []
    if len(names) > MAX_SITES_WITH_TIPS:
        names.sort(key=lambda s: -trouble[s])
        words.append("Sites with the most incidents come first.")
    if len(names) > MAX_MATRIX_SITES:
        words.append(f"{fmt.count(len(names) - MAX_MATRIX_SITES)} further sites are left out.")
        names = names[:MAX_MATRIX_SITES]
    if len(run.rounds) > len(rounds):
        words.append(f"Only the last {len(rounds)} rounds are shown.")
    tips = len(names) <= MAX_SITES_WITH_TIPS
    used: set[State] = set()
    rows = []
    for name in names:
        cells = []
        for r, group, missing in zip(rounds, grouped, disconnected, strict=True):
            state, html = _cell_html(r, name, group.get(name, []), name in missing, tips)
            used.add(state)
            cells.append(html)
        tip = f' title="{esc(name, 64)}"' if len(name) > fmt.LONG_NAME else ""
        rows.append(f'<tr><th scope="row"{tip}>{esc(_short(name))}</th>{"".join(cells)}</tr>')
    heads = "".join(
        f'<th scope="col">{r.number}</th>'
        if r.committed
        else f'<th scope="col" class="skipped" title="skipped: {esc(r.reason)}">{r.number}</th>'
        for r in rounds
    )
    legend = "".join(
        f'<li><span class="cell {state.css}" aria-hidden="true">{state.sign}</span>{state.words}</li>'
        for state in STATES
        if state in used
    )
    if not all(r.committed for r in rounds):
        legend += '<li><span class="cell skipped" aria-hidden="true">7</span>round skipped</li>'
    note = f"<p class='note'>{' '.join(words)}</p>" if words else ""
    caption = "Participation of each site in each round"
    return (
        f'<div class="card"><h3>Sites by round</h3>{note}<ul class="legend">{legend}</ul>'
        f'<div class="scroll matrix-box" role="region" aria-label="{caption}" tabindex="0">'
        f'<table class="matrix"><caption>{caption}</caption>'
        f'<thead><tr><th scope="col" class="corner">site</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div></div>"
    )


def _code(code: str) -> str:
    """The number with its meaning as a tooltip where the catalogue knows it."""
    digits = code.removeprefix("FE-")
    entry = (
        CATALOGUE.get(int(digits))
        if digits.isascii() and digits.isdigit() and len(digits) < 6
        else None
    )
    title = f' title="{esc(entry.title)}"' if entry else ""
    return f"<code{title}>{esc(code)}</code>" if code else fmt.MISSING


def _refusal_table(run: Run) -> str:
    refusals = [x for r in run.rounds for x in (*r.rejected, *r.dropped)]
    if not refusals:
        words = "No rejections: every reply that arrived was in time and counted, and no metric was dropped."
        if any(unconnected(run, r) for r in run.rounds):
            words += " Not every site was connected in every round."
        return f'<div class="card"><h3>Rejections and drops</h3><p><b class="yes">✓</b> {words}</p></div>'
    css = {
        "rejected": "rejected",
        "error": "error",
        "late": "late",
        "stale": "late",
        "duplicate": "late",
    }
    rows = [
        [
            str(x.round),
            fmt.site_name(x.site),
            f'<span class="pill {css.get(x.outcome, "absent")}">{esc(x.outcome, 40)}</span> {_code(x.code)}',
            esc(x.reason) or fmt.MISSING,
        ]
        for x in refusals[:MAX_REFUSAL_ROWS]
    ]
    cut = len(refusals) - len(rows)
    note = f"The first {len(rows)} of {fmt.count(len(refusals))}." if cut else ""
    note = note or (f"{fmt.count(len(rows))} in all; the table scrolls." if len(rows) > 12 else "")
    head = [("round", "n"), ("site", ""), ("outcome", "outcome"), ("reason", "words")]
    grid = fmt.table(
        "Every reply that did not count, and every metric dropped", head, rows, tall=len(rows) > 12
    )
    return fmt.card("Rejections and drops", grid, note)


#: Columns of the table of rounds: head, and the state of the sites that it lists.
_MISSING: Final = (("absent", NO_REPLY), ("late", LATE), ("rejected or failed", REJECTED))


def _round_row(r: Round) -> list[str] | None:
    """A round's row where a site is missing, else None."""
    grouped = by_site(r)
    missing: dict[str, list[str]] = {words: [] for words, _ in _MISSING}
    names = sorted((r.invited | set(grouped)) - r.trained, key=fmt.natural)
    for name in names:
        refusals = grouped.get(name, [])
        state = cell(r, name, refusals)
        for words, expected in _MISSING:
            if state is expected or (expected is REJECTED and state in (ERROR, OTHER)):
                first = next((x for x in refusals if _BY_OUTCOME.get(x.outcome) is state), None)
                why = f": {esc(first.reason)}" if first and state is not LATE else ""
                missing[words].append(f"{fmt.site_name(name)}{why}")
    if not any(missing.values()):
        return None
    cells = []
    for named in missing.values():
        more = f"<br>and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
        cells.append(("<br>".join(named[:MAX_NAMED]) + more) or fmt.MISSING)
    return [str(r.number), str(len(r.trained | set(names))), str(len(r.trained)), *cells]


def _round_table(run: Run) -> str:
    """The sites expected in each round, and those missing with the reason; empty where none was missing."""
    rows = [row for r in run.rounds if (row := _round_row(r)) is not None]
    if not rows:
        return ""
    shown = rows[-MAX_MATRIX_ROUNDS:]
    note = f"The last {len(shown)} of {fmt.count(len(rows))}." if len(shown) < len(rows) else ""
    head = [("round", "n"), ("expected", "n"), ("counted", "n")]
    head += [(words, "words") for words, _ in _MISSING]
    grid = fmt.table("Rounds in which a site was missing", head, shown, tall=len(shown) > 12)
    return fmt.card("Rounds in which a site was missing", grid, note)


def outcome_counts(run: Run) -> Counter[str]:
    """How often each outcome occurred: ``trained``, ``invited``, ``not connected``, and those of the refusals."""
    total = Counter(x.outcome for r in run.rounds for x in (*r.rejected, *r.dropped))
    total["trained"] = sum(len(r.trained) for r in run.rounds)
    total["invited"] = sum(len(r.invited) for r in run.rounds)
    total["not connected"] = sum(len(unconnected(run, r)) for r in run.rounds)
    return total


def in_words(outcomes: Counter[str]) -> str:
    """``2 rejected, 1 late``; empty where every site took part in every round. The text is not escaped."""
    names = [o for o in (*_WEIGHT, *_BESIDES) if outcomes[o]]
    names += sorted(set(outcomes) - set(_WEIGHT) - {"trained", "invited", *_BESIDES})
    words = {"error": "failed at the site", "metric dropped": "with a metric dropped"}
    return ", ".join(f"{fmt.count(outcomes[o])} {words.get(o, o)}" for o in names)


def participation(run: Run) -> str:
    """The section; empty before the first round."""
    if not run.rounds:
        return ""
    outcomes = outcome_counts(run)
    lead = f"{fmt.plural(outcomes['invited'], 'invitation')}, {fmt.plural(outcomes['trained'], 'update')} counted"
    others = in_words(outcomes)
    lead += f"; {esc(others)}." if others else "; none rejected, late or missing."
    small = (
        bool(others)
        and len(run.rounds) <= MAX_ROUNDS_BESIDE
        and len(run.sites) <= MAX_SITES_WITH_TIPS
    )
    body = _matrix(run) + _refusal_table(run)
    body = f'<div class="pair">{body}</div>' if small else body
    return fmt.section("participation", "Who took part", lead, body + _round_table(run))
