"""An audit as one self-contained HTML page and as JSON; the style is that of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedge.server.report import format as fmt
from fedge.server.report.charts import Column, column_chart, responsive
from fedge.server.report.format import esc
from fedge.server.report.heatmap import greys, picture
from fedge.simulations.audit import wording
from fedge.simulations.audit.canaries import Finding, P
from fedge.simulations.audit.inversion import Inversion, View

#: Columns of the chart of scores.
_BINS: Final = 40
_STYLE: Final = (
    ".state.caught, .state.unprotected { background: var(--rejected); color: #fff; }\n"
    ".pictures .greys { width: 100%; max-width: 190px; }\n"
    ".pictures + .note { margin-top: 14px; }\n"
)


def to_json(finding: Finding, inverted: Inversion, seconds: float) -> dict[str, Any]:
    """Everything but scores and pictures, as plain JSON values."""
    return {
        "verdict": finding.verdict,
        "mechanism": finding.mechanism,
        "noise_multiplier": finding.noise_multiplier,
        "noise_factor": finding.noise_factor,
        "honest_sites": finding.honest or None,
        "rounds": finding.rounds,
        "unit": finding.unit,
        "delta": finding.delta,
        "claim": finding.claim,
        "lower_bound": finding.bound,
        "largest_possible_bound": finding.most,
        "confidence": 1 - P,
        "canaries": finding.sizes.canaries,
        "guesses": finding.sizes.guesses,
        "correct": finding.correct,
        "parameters": finding.sizes.parameters,
        "inversion": {
            "reason": inverted.reason or None,
            "layer": inverted.layer or None,
            "direct": inverted.direct,
            "max_error": {v.name: v.error for v in inverted.views},
            "max_error_of_the_example": {v.name: v.example_error for v in inverted.views},
        },
        "seconds": round(seconds, 1),
    }  # fmt: skip


def render(finding: Finding, inverted: Inversion, task: str, config: str, when: str) -> str:
    """The page.

    Args:
        finding: the audit of the noise.
        inverted: the attack on one update.
        task: name.
        config: the configuration, resolved, as TOML.
        when: the moment, as people write it.
    """
    files = resources.files("fedge.server.report")
    style = "".join(
        files.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "secure.css")
    )
    sections = [
        _canaries(finding),
        _meaning(finding),
        _inversion(inverted, finding.mechanism),
        _origin(config),
    ]
    titles = ("Canaries", "What it shows", "One update", "Configuration")
    links = zip(("canaries", "meaning", "inversion", "origin"), titles, strict=True)
    return Template(files.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=esc(f"Audit, {task}, {finding.mechanism}"),
        style=style + _STYLE,
        headline=esc(wording.words(finding) + "."),
        run=esc(f"audit of {task}, mechanism {finding.mechanism}"),
        state=finding.verdict,
        when=f"<time>{esc(when)}</time>",
        nav="".join(f'<a href="#{n}">{t}</a>' for n, t in links),
        body="".join([_checked(finding), _tiles(finding), *sections]),
    )


def _checked(finding: Finding) -> str:
    if finding.noise_factor == 1:
        return ""
    text = (
        f"This is a check of the audit itself: the noise was cut to {finding.noise_factor:g} of what the configuration "
        "says, while the claim stayed. An audit that is worth anything tells that such noise is too little."
    )
    return f'<div class="card warn"><h3>Noise cut on purpose</h3><p>{esc(text, 1000)}</p></div>'


def _tiles(finding: Finding) -> str:
    sizes = finding.sizes
    claim = "none" if finding.claim is None else f"{finding.claim:.2f}"
    bad = finding.verdict != "not contradicted"
    meant, audited = wording.meant(finding), wording.audited(finding)
    tiles = [
        fmt.tile("Claim", claim, f"epsilon of {audited} {meant}", "main"),
        fmt.tile("Lower bound", f"{finding.bound:.2f}", f"epsilon {meant}, proved with {1 - P:.0%} confidence", "main"),
        fmt.tile("Guesses right", f"{finding.correct} of {sizes.guesses}", f"of {sizes.canaries} canaries"),
        fmt.tile("Verdict", finding.verdict, "", "bad" if bad else "good"),
    ]  # fmt: skip
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _canaries(finding: Finding) -> str:
    return fmt.section(
        "canaries", "Canaries", esc(wording.how(finding), 2000), _scores(finding) + _facts(finding)
    )


def _scores(finding: Finding) -> str:
    edges = np.linspace(float(finding.scores.min()), float(finding.scores.max()) + 1e-12, _BINS + 1)
    within, _ = np.histogram(finding.scores[finding.inside], edges)
    without, _ = np.histogram(finding.scores[~finding.inside], edges)
    columns = [
        Column(i, (int(a), int(b)), f"{edges[i]:.3g} to {edges[i + 1]:.3g}: {a} in, {b} out")
        for i, (a, b) in enumerate(zip(within, without, strict=True))
    ]
    ticks = [(i - 0.5, f"{edges[i]:.2g}".replace("-", "−")) for i in (0, 10, 20, 30, 40)]

    def draw(width: float, phone: bool) -> str:
        return column_chart(
            "How many canaries have which score, in and out", ("score", "canaries"), columns,
            ("sent", "received"), width=width, x_ticks=ticks, phone=phone,
        )  # fmt: skip

    legend = (
        '<ul class="legend"><li><span class="key sent"></span>in</li>'
        '<li><span class="key received"></span>out</li></ul>'
    )
    note = (
        "A score is the inner product of the canary and what came out. Where noise protects, both colours lie "
        "on top of each other; where it does not, they lie apart."
    )
    return f'<div class="pair">{fmt.card("Scores", legend + responsive(draw), note)}'


def _facts(finding: Finding) -> str:
    guesses, audited = finding.sizes.guesses, wording.audited(finding)
    meant = wording.meant(finding)
    rows = [("mechanism", esc(finding.mechanism))]
    if finding.noise_multiplier is not None:
        rows.append(("noise multiplier", fmt.significant(finding.noise_multiplier, 6)))
    if finding.noise_factor != 1:
        rows.append(("share of it that was added", fmt.significant(finding.noise_factor, 6)))
    if finding.honest:
        rows.append(("sites that add noise", str(finding.honest)))
    rows += [
        (
            "guesses right",
            f"{finding.correct} of {guesses}, {fmt.share(finding.correct / guesses)}; by chance about half",
        ),
        ("largest bound that it can show", f"{finding.most:.4f} {meant}, with every guess right"),
        ("lower bound", f"{finding.bound:.4f} {meant}"),
        ("claim", "none" if finding.claim is None else f"{finding.claim:.4f} {meant}, by the accountant, of {audited}"),
    ]  # fmt: skip
    note = "One-run audit of Steinke, Nasr and Jagielski (2023), with abstentions."
    return fmt.card("In numbers", fmt.definitions(rows), note) + "</div>"


def _meaning(finding: Finding) -> str:
    cards = [
        fmt.card(title, f"<ul>{''.join(f'<li>{esc(line, 1000)}</li>' for line in lines)}</ul>", css="brief")
        for title, lines in (("It can", wording.can()), ("It cannot", wording.cannot(finding)))
    ]  # fmt: skip
    return fmt.section(
        "meaning",
        "What an audit shows, and what not",
        "",
        f'<div class="pair">{"".join(cards)}</div>',
    )


def _inversion(inverted: Inversion, mechanism: str) -> str:
    title = "What one update gives away"
    if inverted.truth is None or inverted.example is None:
        return fmt.section("inversion", title, esc(inverted.reason, 1000), "")
    lead = (
        "A site trained on one example, in one step, with its own code. In the first linear layer "
        f"({inverted.layer}) the gradient of the weights over that of the bias is the layer's input, exactly; no "
        "guessing is needed."
    )
    looked = not inverted.direct and inverted.views[0].example is not None
    if looked:
        lead += (
            " Other layers come before it, so that its input is what those make of the example. As the server has "
            "their weights, it can look for the example of which they make just that."
        )
    elif not inverted.direct:
        lead += " Other layers come before it: what is recovered, and shown, is what they make of the example."
    truth = inverted.example if looked else inverted.truth
    low, high = float(truth.min()), float(truth.max())
    high = high if high > low else low + 1
    taker = "network" if looked or inverted.direct else "layer"
    cards = [_picture("The example", f"As the {taker} takes it.", truth, low, high, "")]
    for view in inverted.views:
        shown = view.example if looked and view.example is not None else view.layer
        name, note = wording.view(view.name, mechanism)
        cards.append(_picture(name, note, shown, low, high, _errors(view, looked)))
    body = f'<div class="trio pictures">{"".join(cards)}</div>'
    note = (
        "All pictures have the example's own range of grey. Where no example fits, what the search ends with says "
        "nothing of this one. Larger batches and more steps make this attack harder, but not impossible, and no "
        "promise rests on them."
    )
    return fmt.section("inversion", title, esc(lead, 1500), f'{body}<p class="note">{esc(note)}</p>')  # fmt: skip


def _errors(view: View, looked: bool) -> str:
    layer = fmt.significant(view.error, 2)
    if looked and view.example_error is not None:
        error = fmt.significant(view.example_error, 2)
        return f"Largest error {error}; of the layer's input {layer}."
    return f"Largest error {layer}."


def _picture(
    name: str, note: str, values: NDArray[np.float64], low: float, high: float, said: str
) -> str:
    shades = greys(_numbers(values), low, high)
    text = f"{name}, {values.size} values. {said}"
    return fmt.card(name, picture(text, shades) + (f"<p>{esc(said)}</p>" if said else ""), esc(note))  # fmt: skip


def _numbers(values: NDArray[np.float64]) -> Sequence[float]:
    finding: list[float] = np.nan_to_num(values, nan=0.0, posinf=1e300, neginf=-1e300).tolist()
    return finding


def _origin(config: str) -> str:
    lines = "\n".join(esc(line, 1000) for line in config.split("\n"))
    body = f'<details class="card"><summary>Configuration, resolved</summary><pre tabindex="0">{lines}</pre></details>'
    return fmt.section("origin", "Configuration", "", body)
