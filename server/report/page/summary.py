"""The top of the report: the outcome in a sentence, key figures, and a few lines for each audience."""

from __future__ import annotations

from fedge.server.report import format as fmt
from fedge.server.report import noised_figures as noise_figures
from fedge.server.report.format import THIN, esc, metric_name, metric_value, tile
from fedge.server.report.json_values import mapping, number
from fedge.server.report.page.bundle import parity
from fedge.server.report.page.participation import in_words, outcome_counts
from fedge.server.report.page.privacy import in_brief as spent_in_brief
from fedge.server.report.page.privacy import unevaluated
from fedge.server.report.page.secure_aggregation import in_brief
from fedge.server.report.page.sites import not_evaluated, with_value
from fedge.server.report.records import Run


def contributors(run: Run) -> list[str]:
    """The registered sites whose update counted in at least one round."""
    trained = {site for r in run.rounds if r.committed for site in r.trained}
    return [
        name
        for name, site in run.sites.items()
        if (name in trained if site.rounds is None else site.rounds > 0)
    ]


def headline(run: Run) -> str:
    """The outcome in one sentence (text, not escaped)."""
    sites, done = fmt.plural(len(run.sites), "site"), len(run.rounds)
    if done and (counted := len(contributors(run))) < len(run.sites):
        sites = f"{fmt.count(counted)} of {sites}"
    nothing = "not evaluated, for privacy's sake" if unevaluated(run) else "not evaluated yet"
    reached = noise_figures.outcome(run) or nothing
    if run.finished:
        return f"{run.strategy} trained {run.task} across {sites} in {fmt.plural(done, 'round')}: {reached}."
    progress = f"{done} of {fmt.plural(run.planned, 'round')} done"
    if run.state == "stopped":
        return f"{run.strategy} on {run.task} was stopped across {sites}, {progress}: {reached}."
    return f"{run.strategy} is training {run.task} across {sites}, {progress}: {reached}."


def tiles(run: Run) -> str:
    """The key figures."""
    lead, outcomes = run.lead, outcome_counts(run)
    noise, alike = noise_figures.last(run), noise_figures.sites_alike(run)
    name = metric_name(lead)
    figures = []
    for title, view, values, words in (
        ("Site mean", "site_mean", run.site_mean, "every site alike"),
        ("Pooled", "pooled", run.pooled, "all examples together"),
    ):
        if lead not in values or (alike and view == "site_mean"):
            continue
        shown = noise_figures.shown(lead, values[lead], noise.stddev(view, lead))
        title_, words_ = ("All sites", "every site alike") if alike else (title, words)
        sign = f"; {noise_figures.SIGN}" if noise.unit else ""
        figures.append(tile(title_, shown, f"{name}, {words_}{sign}", "main"))
    names = contributors(run) if run.rounds else list(run.sites)
    sizes = [e for name in names if (e := run.sites[name].train_examples) is not None]
    every = fmt.count(len(run.sites))
    figures.append(
        tile(
            "Sites",
            every if len(names) == len(run.sites) else f"{fmt.count(len(names))} of {every}",
            f"{fmt.count(sum(sizes))} training examples" if sizes else "",
        )
    )
    skipped = sum(not r.committed for r in run.rounds)
    value = (
        fmt.count(len(run.rounds))
        if run.finished
        else f"{fmt.count(len(run.rounds))} / {fmt.count(run.planned)}"
    )
    figures.append(tile("Rounds", value, f"{skipped} skipped" if skipped else "none skipped"))
    if run.rounds:
        figures.append(
            tile(
                "Updates counted",
                fmt.count(outcomes["trained"]),
                in_words(outcomes) or "none rejected",
            )
        )
    if run.sent is not None or run.received is not None:
        total = (run.sent or 0) + (run.received or 0)
        figures.append(tile("Data moved", fmt.size(total), "to the sites and back"))
    if run.seconds is not None:
        words = f"{fmt.duration(run.seconds / len(run.rounds))} a round" if run.rounds else ""
        figures.append(tile("Time", fmt.duration(run.seconds), words))
    return f'<div class="tiles">{"".join(figures)}</div>'


def _engineering(run: Run) -> list[str]:
    lines = []
    losses = [r.train["loss"] for r in run.rounds if "loss" in r.train]
    if len(losses) > 1:
        lines.append(f"Training loss went from {losses[0]:.3f} to {losses[-1]:.3f}.")
    elif losses:
        lines.append(f"Training loss is {losses[0]:.3f} after one round.")
    moved = (run.sent or 0) + (run.received or 0)
    if run.rounds and run.seconds is not None and moved:
        each = len(run.rounds)
        lines.append(
            f"A round took {fmt.duration(run.seconds / each)} and moved {fmt.size(moved / each)} on average."
        )
    manifest = mapping(run.release.get("manifest"))
    differences = parity(manifest)
    if differences is not None:
        words = "within" if differences[0] <= differences[1] else "outside"
        lines.append(
            f"The exported model is {words} tolerance of the trained one ({fmt.significant(differences[0])})."
        )
    p50 = number(mapping(manifest.get("latency")).get("p50_ms"))
    if p50 is not None:
        lines.append(
            f"At release, half of all predictions took less than {fmt.duration(p50 / 1000)}."
        )
    return lines


def _security(run: Run) -> list[str]:
    others = in_words(outcome_counts(run))
    lines = [
        f"Replies that did not count fully: {others}."
        if others
        else "No reply was rejected, late or missing."
    ]
    lines += [*in_brief(run), *spent_in_brief(run)]
    if run.release:
        lines.append("The model is released as a bundle signed with Ed25519.")
        verified = run.edge.get("verified")
        if verified is True:
            lines.append("The device verified the bundle's signature and hashes.")
        elif verified is False:
            lines.append("The device refused the bundle.")
    else:
        lines.append("No bundle has been released from this run yet.")
    return lines


def _clinical(run: Run) -> list[str]:
    lead = run.lead
    measured = {s: v[lead] for s, v in run.per_site.items() if lead in v}
    if run.masked and lead in run.pooled:
        lines = [*noise_figures.over_all(run), "No site's own result is known to the server."]
        return [*lines, *_agreement(run)]
    if not measured and lead in run.pooled:
        lines = noise_figures.over_all(run)
        lines += (
            ["No site's own result is told: noise hides it."]
            if noise_figures.last(run).unit
            else []
        )
        return [*lines, *_agreement(run)]
    if not measured and (why := unevaluated(run)):
        return [f"No site evaluates, {why}.", *_agreement(run)]
    if not measured:
        return ["No site has been evaluated yet."]
    name = metric_name(lead)
    noise = noise_figures.last(run)
    clear = {
        s: v
        for s, v in measured.items()
        if not noise_figures.below_noise_floor(noise.site_stddev(s, lead))
    }
    if not clear:
        lines = noise_figures.over_all(run) if lead in run.pooled else []
        return [*lines, f"Each site's own result is {noise_figures.WORDS}.", *_agreement(run)]
    left_out, measured = len(measured) - len(clear), clear
    worst, best = min(measured.values()), max(measured.values())
    if lead == "loss":
        worst, best = best, worst
    lines = []
    if worst != best:
        lines.append(
            f"Measured at the sites: {name} from {metric_value(lead, worst)} ({with_value(measured, worst)}) "
            f"to {metric_value(lead, best)} ({with_value(measured, best)}) on each site's own examples."
        )
    elif len(measured) > 1:
        lines.append(
            f"Measured at the sites: {name} of {metric_value(lead, best)} at each of the "
            f"{len(measured)} sites on its own examples."
        )
    if noise.unit:
        largest = max(noise.site_stddev(s, lead) or 0.0 for s in measured)
        more = f"; {fmt.plural(left_out, 'more site is', 'more sites are')} {noise_figures.WORDS}"
        lines.append(
            f"These have noise, of a standard deviation of up to {noise_figures.spread(lead, largest)}"
            f"{' points' if fmt.is_share(lead) else ''}{more if left_out else ''}."
        )
    evaluated = [run.sites[s] for s in run.per_site if s in run.sites]
    tests = [s.test_examples for s in evaluated if s.test_examples is not None]
    if tests:
        lines.append(f"Measured on {fmt.plural(sum(tests), 'held-out example')}.")
    if missing := not_evaluated(run):
        lines.append(missing)
    return lines + _agreement(run)


def _agreement(run: Run) -> list[str]:
    agreement = number(run.edge.get("agreement"))
    if agreement is None:
        return []
    same = "every row" if agreement == 1 else f"{min(100 * agreement, 99.99):.2f}{THIN}% of rows"
    return [f"The device gives the trained model's label for {same}."]


def brief(run: Run) -> str:
    """A summary for the engineer, the security officer and the physician, in that order."""
    cards = []
    for title, said in (
        ("Engineering", _engineering(run)),
        ("Security", _security(run)),
        ("In use", _clinical(run)),
    ):
        if said:
            items = "".join(f"<li>{esc(line, 1000)}</li>" for line in said)
            cards.append(f'<div class="card brief"><h3>{title}</h3><ul>{items}</ul></div>')
    return f'<div class="trio">{"".join(cards)}</div>'
