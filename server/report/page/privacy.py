"""The report's section on differential privacy: epsilon that the sites report as spent, and what it means."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

from fedge.server.report import format as fmt
from fedge.server.report.format import MISSING, THIN, esc
from fedge.server.report.json_values import mapping, number, text
from fedge.server.report.page.learning import MAX_SITES_SINGLY
from fedge.server.report.page.privacy_central import UNBOUNDED, run_epsilons, sampling_facts
from fedge.server.report.page.privacy_epsilon import (
    SHORT_TABLE_ROWS,
    RoundEpsilon,
    Spent,
    charts,
    epsilon_text,
    spent,
)
from fedge.server.report.records import Run

#: Rows of the table of sites, and sites that a sentence names.
MAX_ROWS: Final = 500
MAX_NAMED: Final = 8
#: A figure may fall by this share through the accountant's rounding.
FALL: Final = 0.01

WORDS: Final = (
    (
        "Epsilon",
        "A bound on how much one training example, or where whole sites are protected one site, can change what comes "
        "out. Smaller is better.",
    ),
    ("Delta", "The small probability with which epsilon's bound need not hold."),
    (
        "Study",
        "The name under which a site keeps account of its data. All runs on them spend of one budget of epsilon.",
    ),
    (
        "Ledger",
        "A site's own record of all that it has given out under noise, over all runs, and of what that adds up to.",
    ),
)
#: By mechanism: what it protects, in the plural and as a fact, and how it works.
_MECHANISMS: Final = {
    "example": (
        "training examples",
        "a single training example; not a person with several of them, and not a site",
        "DP-SGD at each site: in every step each example's gradient is scaled down to the clipping bound, and noise is "
        "added to their sum, before anything leaves the site",
    ),
    "distributed": (
        "sites",
        "a whole site: all that it has, whatever its number of examples",
        "distributed discrete Gaussian: each site scales its update down to the clipping bound and adds a part of the "
        "noise under its mask; whatever sum is opened holds all of it",
    ),
    "central": (
        "sites",
        "a whole site: all that it has, whatever its number of examples",
        "noise of the server's: it gets the updates as they are, scales each down to the clipping bound, and adds "
        "noise to their sum before anybody sees the model",
    ),
    "central-mf": (
        "sites",
        "a whole site: all that it has, whatever its number of examples",
        "noise of the server's, correlated over the rounds: it gets the updates as they are and scales each down to "
        "the clipping bound; later rounds take back a part of the noise of earlier ones, so that less of it adds up",
    ),
    "local": (
        "sites",
        "a whole site: all that it has, whatever its number of examples",
        "local: each site scales its update down to the clipping bound and adds all of the noise itself, before "
        "anything leaves it",
    ),
}
#: Outputs that may be left without noise, by their key: in brief, and at length.
_UNPROTECTED: Final = {
    "metrics": (
        "results on held-out examples (exact counts)",
        "Held-out metrics are exact counts over examples that were kept from training, without noise "
        "(privacy.metrics is unprotected). Nothing bounds what they tell of those examples.",
    ),
    "statistics": (
        "mean and deviation of columns",
        "Statistics are exact: where the task learns mean and deviation of columns, they are those of the training "
        "examples, without noise (privacy.statistics is unprotected). Nothing bounds what they tell of those examples.",
    ),
}


@lru_cache(maxsize=4)
def _section(config: str) -> Mapping[str, Any]:
    try:
        return mapping(tomllib.loads(config).get("privacy"))
    except tomllib.TOMLDecodeError:
        return {}


def private(run: Run) -> bool:
    """Whether noise was added; where the configuration does not state it, whether a site reports epsilon."""
    mechanism = text(_section(run.config).get("mechanism"))
    return mechanism != "off" if mechanism else bool(spent(run).sites)


def unevaluated(run: Run) -> str:
    """Why no site evaluates (text, the end of a sentence); empty where privacy is not the reason."""
    if not private(run) or _section(run.config).get("metrics") != "off":
        return ""
    return "as counts over held-out examples would leave the sites without noise (privacy.metrics is off)"


def _unprotected(run: Run) -> list[tuple[str, str]]:
    return [
        words
        for key, words in _UNPROTECTED.items()
        if _section(run.config).get(key) == "unprotected"
    ]


def _units(run: Run) -> tuple[str, str, str]:
    mechanism = text(_section(run.config).get("mechanism"))
    return _MECHANISMS.get(mechanism, ("units of data", "", mechanism))


def _whole_sites(run: Run) -> bool:
    return _units(run)[0] == "sites"


def _both(t: RoundEpsilon) -> str:
    if t.consumers == t.server:
        return f"{epsilon_text(t.server)} against the model's readers and the server alike"
    consumers = epsilon_text(t.consumers)
    if t.server == math.inf:
        return f"{consumers} against the model's readers; against the server it is {UNBOUNDED}"
    server = epsilon_text(t.server)
    return f"{consumers} against the model's readers and {server} against the server"


def _run_epsilon(run: Run) -> RoundEpsilon | None:
    """Epsilon of this run alone for a site under secure aggregation, by the server; None where it is unknown."""
    epsilons = run_epsilons(run)
    if not epsilons or not run.masked:
        return None
    return RoundEpsilon(epsilons[-1].round, epsilons[-1].consumers, epsilons[-1].sample_known)


def in_brief(run: Run) -> list[str]:
    """Lines for the security officer (text); none without differential privacy."""
    if not private(run):
        return []
    reported, units = spent(run), _units(run)[0]
    if largest := reported.largest:
        sentence = (
            f"Noise bounds what is told of single {units}: the largest epsilon that a site tells is "
            f"{_both(largest[-1])}, over all its runs, {reported.at}."
        )
    elif ours := _run_epsilon(run):
        sentence = (
            f"Noise bounds what is told of single {units}: by the server's reckoning this run alone costs a site "
            f"epsilon {_both(ours)} at most, at delta {run_epsilons(run)[-1].delta:g}."
        )
    else:
        sentence = f"Noise bounds what is told of single {units}; what is spent stands in each site's ledger."
    without = " and ".join(words for words, _ in _unprotected(run))
    return [
        sentence,
        *([f"Without noise, and not covered by epsilon: {without}."] if without else []),
    ]


def _warning(run: Run) -> str:
    if not (lines := [words for _, words in _unprotected(run)]):
        return ""
    if run.masked:
        lines.append("The server saw them as sums over several sites only; those sums are exact.")
    items = "".join(f"<li>{esc(line)}</li>" for line in lines)
    return f'<div class="card warn"><h3>Not covered by epsilon</h3><ul>{items}</ul></div>'


def _facts(run: Run) -> str:
    section, (_, unit, how) = _section(run.config), _units(run)
    mechanism = text(section.get("mechanism"))
    exact = {"unprotected": "without noise, see above"}
    metrics = {
        **exact,
        "noised": "counts with noise of their own, which each site charges to its ledger",
        "off": "nobody evaluates, so this report has no accuracy: counts would be without noise",
    }
    statistics = {**exact, "off": "the task learns no mean and no deviation of columns"}
    clipped = "one site's update" if _whole_sites(run) else "one example's gradient"
    reported = spent(run)
    delta = "each site's own; it stands in the site's ledger, and not here. Unlike deltas do not compare"
    if reported.delta is not None:
        delta = f"{reported.delta:g}, the run's; a site's budget counts at its owner's"
    if _run_epsilon(run):
        delta = (
            f"{run_epsilons(run)[-1].delta:g} for this run alone, which is what stands here; "
            "in a site's ledger its own"
        )
    rows = [
        ("unit protected", unit),
        ("mechanism", f"{how} ({mechanism})" if how != mechanism else mechanism),
        _noise(section),
        ("clipping bound", _value(section, "clipping-bound", f"greatest length (L2 norm) of {clipped}")),
        *sampling_facts(section),
        ("delta", delta),
        ("counted", "all runs of a site's study together, this one and those before"),
        ("budget", "each site's own; the site refuses the round that would exceed it"),
        ("held-out metrics", metrics.get(text(section.get("metrics")), MISSING)),
        ("statistics", statistics.get(text(section.get("statistics")), MISSING)),
    ]  # fmt: skip
    return fmt.card("What is protected, and how", fmt.definitions((k, esc(v)) for k, v in rows))


def _noise(section: Mapping[str, Any]) -> tuple[str, str]:
    """The amount of noise, or the target epsilon that determines it."""
    epsilon, delta = number(section.get("epsilon")), number(section.get("delta"))
    if epsilon is None:
        meaning = "its standard deviation, by the clipping bound"
        if section.get("mechanism") == "local":
            meaning = "its standard deviation, by twice the clipping bound"
        return "noise multiplier", _value(section, "noise-multiplier", meaning)
    at = "" if delta is None else f" at delta {fmt.significant(delta, 6)}"
    return (
        "noise",
        f"each site's own, such that this run costs its examples epsilon {fmt.significant(epsilon, 6)}{at} at most",
    )


def _value(section: Mapping[str, Any], key: str, words: str) -> str:
    value = number(section.get(key))
    return MISSING if value is None else f"{fmt.significant(value, 6)}: {words}"


def certainty(epsilon: float) -> str:
    """Largest certainty of a membership inference with a prior of 1/2: e^epsilon to 1, delta apart, rounded up."""
    percent = math.ceil(10_000 / (1 + math.exp(-epsilon))) / 100
    if percent > 99.99:
        return "as good as certain, so that the bound alone says next to nothing"
    return f"at most {percent:.2f}{THIN}% sure"


def _meaning(run: Run, reported: Spent) -> str:
    whole = _whole_sites(run)
    one, sampled = ("site", "sites a round") if whole else ("example", "examples a step")
    adversaries = {
        "model's readers": f"whoever gets the model or its predictions, and does not see which {sampled} draws",
        "server": "whoever runs it; it sees which sites take part"
        + ("" if whole else ", but not which examples they draw"),
    }
    rows = []
    for index, (who, words) in enumerate(adversaries.items(), 1):
        last = reported.largest[-1] if reported.largest else _run_epsilon(run)
        value = last[index] if last else None
        if value == math.inf:
            rows.append((who, f"<b>{UNBOUNDED}</b><br>{words}"))
            continue
        sure = "" if value is None else f"<b>{certainty(value)}</b><br>"
        at = f" {reported.at}" if reported.largest and reported.delta is not None else ""
        rows.append((who if value is None else f"{who}, {epsilon_text(value)}{at}", sure + words))
    # Not told under masks, nor where whole sites are protected.
    hidden = all(site.train_examples is None for site in run.sites.values())
    seen = "who took part and when" if hidden else "who took part, when, with how many examples"
    whose = "the sites' own, which the server cannot check"
    if not reported.largest and _run_epsilon(run):
        whose = "the server's, of this run alone and for a site that was in all of it"
    several = (
        ""
        if whole
        else "a person with several examples, for whom epsilon can be as many times as large; "
    )
    rows += [
        ("rule of thumb", "up to 1 is strong; up to 10 is reasonable by what attacks are known to reach, though the "
            "bound itself says little; above that is weak (after Ponomareva et al., 2023)"),
        ("not covered", f"what many {one}s have in common, which the model is to learn; {several}what the server sees "
            f"anyway: {seen}"),
        ("whose figures", f"{whose}. The evidence is each site's ledger: "
            "<code>fedge privacy ledger</code> prints it at the site"),
    ]  # fmt: skip
    note = f"Epsilon bounds what can be found out about one {one}, delta apart."
    if reported.largest or _run_epsilon(run):
        note += (
            " A reader who knows all else, and gives even odds to whether it was trained on, can become this sure of "
            "it from what came out:"
        )
    return fmt.card("What epsilon says, and what not", fmt.definitions(rows), note)


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(fmt.plain(name, 64) for name in names[:MAX_NAMED])
    more = len(names) - MAX_NAMED
    return f"{shown} and {fmt.count(more)} more" if more > 0 else shown


def _table(run: Run, reported: Spent) -> str:
    """The sites' last figures, with remarks on missing and falling ones."""
    last_trained = {site: r.number for r in run.rounds for site in r.trained}
    names = sorted({*run.sites, *reported.sites}, key=fmt.natural)
    last = {site: epsilons[-1] for site, epsilons in reported.sites.items()}
    if len(names) > MAX_SITES_SINGLY:
        names.sort(key=lambda s: -last[s].server if s in last else 1.0)
    rows = []
    for site in names[:MAX_ROWS]:
        t = last.get(site)
        server = "unbounded" if t and t.server == math.inf else f"{t.server:.4f}" if t else MISSING
        values = (f"{t.consumers:.4f}", server, str(t.round)) if t else (MISSING,) * 3
        rows.append([fmt.site_name(site), *values])
    note = (
        "What each site says to have spent, over all runs of its study; with the decimals of its ledger. "
        + (
            "Each figure is at its site's own delta, which it does not tell; figures at unlike deltas do not compare. "
            if reported.delta is None
            else f"All are {reported.at}; each ledger's budget counts at its owner's. "
        )
        + "The largest is no epsilon of all sites."
    )
    if len(rows) < len(names):
        note += f" The {len(rows)} largest of {fmt.count(len(names))}."
    if unreported := [s for s, n in last_trained.items() if s not in last or last[s].round < n]:
        unreported.sort(key=fmt.natural)
        note += f" No figure came with the last update of {_named(unreported)}."
    if fell := [
        site
        for site, epsilons in reported.sites.items()
        if any(b[i] < (1 - FALL) * a[i] for a, b in pairwise(epsilons) for i in (1, 2))
    ]:
        note += (
            f" Figures fell at {_named(fell)}, which what is spent cannot do: the site has changed its study or its "
            "delta, or does not tell the truth."
        )
    if any(r.rejected for r in run.rounds):
        note += " An update that came and did not count was charged as well; that shows with the site's next figure."
    head = [("site", ""), ("model's readers", "n"), ("server", "n"), ("after round", "n")]
    grid = fmt.table("Epsilon of each site", head, rows, tall=len(rows) > SHORT_TABLE_ROWS)
    return fmt.card("Epsilon of each site", grid, esc(note, 2000))


def privacy(run: Run) -> str:
    """The section; empty without differential privacy."""
    if not private(run):
        return ""
    reported, (units, _, _) = spent(run), _units(run)
    if reported.largest:
        last = reported.largest[-1]
        lead = (
            f"Noise bounds what comes out about single {units}. After round {last.round} the largest epsilon that a "
            f"site tells is {_both(last)}, over all runs, {reported.at}."
        )
    elif ours := _run_epsilon(run):
        lead = (
            f"Noise bounds what comes out about single {units}. After round {ours.round} this run alone has cost a "
            f"site epsilon {_both(ours)} at most, at delta {run_epsilons(run)[-1].delta:g}, by the server's reckoning. "
            "Under masks it is not told what the sites have spent over all runs: each site's ledger has it, and the "
            "command fedge privacy ledger prints it there."
        )
    elif run.masked:
        lead = (
            f"Noise bounds what comes out about single {units}. Under masks the server is not told what the sites have "
            "spent: each site's ledger has it, and the command fedge privacy ledger prints it there."
        )
    else:
        lead = f"Noise bounds what comes out about single {units}. No site has told yet what it has spent."
    drawings, grid = list(charts(run, reported)), _table(run, reported) if reported.sites else ""
    parts = [
        "".join(drawings) + (grid if len(drawings) == 1 else ""),
        _facts(run) + _meaning(run, reported),
    ]
    body = "".join(f'<div class="pair">{part}</div>' for part in parts if part)
    body = _warning(run) + body + (grid if len(drawings) != 1 else "")
    return fmt.section("privacy", "Privacy", esc(lead, 1000), body)
