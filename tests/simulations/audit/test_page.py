"""The audit's page: complete in itself, escaped, and it says what an audit can and cannot show."""

import re

import numpy as np
import pytest

from fedge.simulations.audit import page, wording
from fedge.simulations.audit.canaries import Finding, Sizes
from fedge.simulations.audit.inversion import Inversion, View

SCORES = np.linspace(-1.0, 2.0, 200)


def finding(mechanism="distributed", bound=1.2, claim=4.4, factor=1.0, most=4.8):
    honest = 5 if mechanism == "distributed" else 0
    noise = None if claim is None else 1.0
    rounds = 12 if mechanism == "central-mf" else 1
    return Finding(
        mechanism, Sizes(200, 80, 5000), noise, factor, honest, 1e-5, claim,
        SCORES, SCORES > 0.5, 70, bound, most, rounds,
    )  # fmt: skip


def inversion(mechanism="distributed", looked=True):
    rng = np.random.default_rng(1)
    truth, example = rng.random(20), rng.random(16)
    views = []
    for name in ("plain", "masked", mechanism):
        error = 1e-7 if name == "plain" else 2.5
        again = (example + error, error) if looked else ()
        views.append(View(name, truth + error, error, *again))
    return Inversion("fc1", not looked, truth, example, tuple(views))


def rendered(found, inverted=None, task="digits", config="[task]\nname = 'digits'"):
    return page.render(found, inverted or inversion(), task, config, "2026-11-22 08:00:00 UTC")


@pytest.mark.parametrize("looked", [True, False])
def test_the_page_loads_nothing_and_runs_nothing(looked):
    html = rendered(finding(), inversion(looked=looked))
    assert not re.search(r"""(?:src|href|action)\s*=\s*["'](?!#)""", html)
    assert not re.search(r"https?://|url\(|@import|<script|<img|<link|<iframe", html)
    assert "default-src 'none'" in html
    assert html.count('class="greys"') == 4
    assert "None" not in html
    assert "nan" not in html


def test_what_comes_from_outside_is_escaped():
    html = rendered(finding(), Inversion(reason="<b>no</b>"), "<i>x</i>", "a = '<script>'")
    assert not any(wrong in html for wrong in ("<b>no", "<i>x", "<script"))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (finding(), "Not contradicted: the guesses prove an epsilon of 1.20 for one site at delta 1e-05, below the "
         "claim of 4.40"),
        (finding(bound=4.8), "CAUGHT: epsilon for one site at delta 1e-05 is at least 4.80, above the claim of 4.40"),
        (finding("off", 4.8, None), "Nothing protects: epsilon of plain training for one example at delta 1e-05 is at "
         "least 4.80, as much as this audit can show"),
        (finding(claim=9.0), "Not contradicted: the guesses prove an epsilon of 1.20 for one site at delta 1e-05, "
         "below the claim of 9.00; no outcome could, as this audit shows 4.80 at most"),
    ],
)  # fmt: skip
def test_the_verdict_in_words(found, expected):
    assert wording.words(found) == expected
    assert f"<h1>{expected}.</h1>" in rendered(found)


def test_limits_are_told_and_a_check_of_the_check_is_named():
    html = rendered(finding(bound=4.8, factor=0.25))
    assert "It cannot confirm" in html
    assert "It cannot show more than 4.80" in html
    assert "Noise cut on purpose" in html
    assert "Noise cut on purpose" not in rendered(finding())


@pytest.mark.parametrize(
    ("mechanism", "unit", "audited", "view", "told"),
    [
        ("example", "example", "one release", "One update with DP-SGD", "It looks at one release"),
        ("distributed", "site", "one release", "The opened sum", "The 5 sites that the configuration"),
        ("central", "site", "one release", "The noised mean", "every site is drawn"),
        ("central-mf", "site", "the whole run, 12 rounds", "The noised mean", "It looks at one run, not at several"),
        ("local", "site", "one update", "One update with local noise", "or its negation (out)"),
    ],
)  # fmt: skip
def test_the_page_says_what_was_audited(mechanism, unit, audited, view, told):
    html = rendered(finding(mechanism), inversion(mechanism))
    meant = f"for one {unit} at delta 1e-05"
    assert f"epsilon of {audited} {meant}" in html
    assert f"4.4000 {meant}, by the accountant, of {audited}" in html
    # Headline, both tiles, three rows, and the limit.
    assert html.count(meant) == 7
    assert page.to_json(finding(mechanism), inversion(mechanism), 1.0)["unit"] == unit
    assert view in html
    assert told in html
    central = mechanism.startswith("central")
    assert ("What the server gets" in html) == central
    assert ("nothing is claimed against it" in html) == central
    assert ("One plain update" in html) == (not central)


def test_json_has_the_numbers():
    found = page.to_json(finding(), inversion(), 12.34)
    assert (found["verdict"], found["claim"], found["lower_bound"]) == (
        "not contradicted",
        4.4,
        1.2,
    )
    assert found["inversion"]["max_error"] == {"plain": 1e-7, "masked": 2.5, "distributed": 2.5}
    assert page.to_json(finding("central-mf"), inversion("central-mf"), 1.0)["rounds"] == 12
    assert (found["confidence"], found["honest_sites"], found["seconds"]) == (0.95, 5, 12.3)
