"""The section on privacy: epsilon by adversary, and outputs without noise; nothing of it in plain runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fedge.server.report.page.privacy import MAX_ROWS, certainty
from fedge.server.report.page.privacy_epsilon import epsilon_text, spent
from fedge.server.report.page.render import render
from fedge.server.report.run_data import read
from fedge.simulations.terminal.summary import summary_table

from .test_render import Page, Run, page, put, run_files

CONFIG = """[privacy]
mechanism = "example"
noise-multiplier = 1.1
clipping-bound = 0.5
metrics = "{metrics}"
statistics = "{statistics}"
"""


def private_files(
    sites: int = 8,
    rounds: int = 12,
    *,
    metrics: str = "unprotected",
    statistics: str = "off",
    finished: bool = True,
) -> Run:
    """The files of a run under differential privacy, as the server writes them: site-1 spends most."""
    files = run_files(sites, rounds, finished=finished)
    for line in files["rounds.jsonl"]:
        line["metrics"]["train"] = {}
        line["privacy"] = {
            site: {"consumers": line["round"] / i, "server": 2 * line["round"] / i}
            for i, site in enumerate(line["trained"], 1)
        }
        if metrics == "off":
            line["metrics"] |= {"per_site": {}, "site_mean": {}, "pooled": {}}
    if metrics == "off" and finished:
        files["metrics.json"]["final"] |= {"per_site": {}, "site_mean": {}, "pooled": {}}
    files["config.toml"] = CONFIG.format(metrics=metrics, statistics=statistics)
    return files


def tell(files: Run, consumers: Any, server: Any) -> Run:
    """Each site of each round says the same."""
    for line in files["rounds.jsonl"]:
        line["privacy"] = {
            site: {"consumers": consumers, "server": server} for site in line["trained"]
        }
    return files


def labels(found: Page) -> list[str]:
    """What the section's wide charts say to those who cannot see them."""
    every = [
        a["aria-label"] or "" for tag, a in found.tags if tag == "svg" and a.get("width") == "540"
    ]
    return [label for label in every if "readers" in label]


def section(found: Page) -> str:
    """The section's text, from its lead on."""
    start = found.text.index("Noise bounds what comes out")
    return found.text[start : found.text.index("What it cost", start)]


def rows(found: Page) -> str:
    """The text of the table of sites."""
    text = section(found)
    return text[text.rindex("sitemodel's readers") :]


def test_what_was_spent(tmp_path: Path) -> None:
    found = page(tmp_path, private_files())
    text = section(found)
    assert (
        "After round 12 the largest epsilon that a site tells is 12.0 against the model's" in text
    )
    assert (
        "readers and 24.0 against the server, over all runs, each at its own site's delta." in text
    )
    assert "a single training example; not a person with several of them" in text
    assert "noise multiplier1.1:" in text
    assert "clipping bound0.5:" in text
    assert "deltaeach site's own; it stands in the site's ledger" in text
    assert "the sites' own, which the server cannot check" in text
    assert "who took part, when, with how many examples" in text
    assert "site-112.000024.000012" in rows(found)
    assert "site-81.50003.000012" in rows(found)
    assert ("a", {"href": "#privacy"}) in found.tags
    assert "The small probability with which epsilon's bound need not hold." in found.text


def test_in_brief(tmp_path: Path) -> None:
    text = page(tmp_path, private_files()).text
    brief = text[text.index("Security") : text.index("In use")]
    assert (
        "the largest epsilon that a site tells is 12.0 against the model's readers and 24.0 against the server"
        in brief
    )
    assert "not covered by epsilon: results on held-out examples (exact counts)." in brief


def test_both_readers_are_drawn(tmp_path: Path) -> None:
    (label,) = labels(page(tmp_path, private_files()))
    assert label == (
        "Epsilon by round: model's readers, largest over the sites, 12.0 at the end; "
        "server, largest over the sites, 24.0 at the end"
    )


def test_the_smaller_figures_have_a_chart_of_their_own_where_the_larger_hide_them(
    tmp_path: Path,
) -> None:
    near, far = labels(page(tmp_path, tell(private_files(), 1.0, 4.0)))
    assert "1.00 at the end; server" in near
    assert "server" not in far
    assert len(labels(page(tmp_path, tell(private_files(), 1.0, 3.99)))) == 1


def test_readers_that_coincide_are_told_in_words(tmp_path: Path) -> None:
    found = page(tmp_path, tell(private_files(), 3.0, 3.0))
    assert labels(found) == [
        "Epsilon by round: both readers, largest over the sites, 3.00 at the end"
    ]
    assert "so one line stands for both" in section(found)
    assert "3.00 against the model's readers and the server alike" in section(found)
    # The failing twin: one figure of one site differs.
    files = tell(private_files(), 3.0, 3.0)
    files["rounds.jsonl"][4]["privacy"]["site-2"]["server"] = 3.0001
    found = page(tmp_path, files)
    assert "one line stands for both" not in section(found)
    assert "so close together that they read the same" in section(found)


def test_what_was_spent_stands_while_a_site_is_away(tmp_path: Path) -> None:
    files = private_files()
    for line in files["rounds.jsonl"][6:]:
        del line["privacy"]["site-1"]
        line["trained"] = line["trained"][1:]
    found = page(tmp_path, files)
    told = spent(read(tmp_path / "run")).largest
    # The failing twin: among those who were there, the largest would fall to 3.5 in round 7.
    assert [t.consumers for t in told] == [1.0, 2.0, 3.0, 4.0, 5.0, *7 * [6.0]]
    assert "site-16.000012.00006" in rows(found)
    assert "No figure came" not in section(found)


def test_an_update_without_a_figure_is_told(tmp_path: Path) -> None:
    files = private_files()
    del files["rounds.jsonl"][-1]["privacy"]["site-3"]
    for line in files["rounds.jsonl"]:
        del line["privacy"]["site-8"]
    found = page(tmp_path, files)
    assert "No figure came with the last update of site-3, site-8." in section(found)
    assert "site-8–––" in rows(found)
    assert "No figure came" not in section(page(tmp_path, private_files()))


def test_a_figure_that_falls_is_told(tmp_path: Path) -> None:
    files = private_files()
    files["rounds.jsonl"][5]["privacy"]["site-2"] = {"consumers": 0.1, "server": 0.2}
    files["rounds.jsonl"][11]["privacy"]["site-4"]["server"] *= 0.9999
    assert "Figures fell at site-2, which" in section(page(tmp_path, files))
    assert "Figures fell" not in section(page(tmp_path, private_files()))


def test_what_did_not_count_was_charged(tmp_path: Path) -> None:
    files = private_files()
    assert "did not count was charged as well" not in section(page(tmp_path, files))
    files["rounds.jsonl"][0]["rejected"] = [
        {"site": "site-8", "code": "FE-408", "outcome": "late", "reason": "too late"}
    ]
    assert "did not count was charged as well" in section(page(tmp_path, files))


@pytest.mark.parametrize("metrics", ["off", "unprotected"])
@pytest.mark.parametrize("statistics", ["off", "unprotected"])
def test_what_epsilon_does_not_cover_is_warned_of(
    tmp_path: Path, metrics: str, statistics: str
) -> None:
    text = page(tmp_path, private_files(metrics=metrics, statistics=statistics)).text
    assert ("Held-out metrics are exact counts" in text) == (metrics == "unprotected")
    assert ("Statistics are exact" in text) == (statistics == "unprotected")
    assert ("Not covered by epsilon" in text) == ("unprotected" in (metrics, statistics))
    assert ("Without noise, and not covered" in text) == ("unprotected" in (metrics, statistics))
    assert ("the task learns no mean" in text) == (statistics == "off")


@pytest.mark.parametrize("finished", [True, False])
def test_why_there_is_no_accuracy(tmp_path: Path, finished: bool) -> None:
    text = page(tmp_path, private_files(metrics="off", finished=finished)).text
    assert ": not evaluated, for privacy's sake." in text
    assert "No site evaluates, as counts over held-out examples would leave the sites" in text
    assert "nobody evaluates, so this report has no accuracy" in text
    assert "yet." not in text[text.index("In use") : text.index("Learning", text.index("In use"))]
    assert "12.0 against the model's readers" in text


def test_before_the_first_evaluation_nothing_else_is_said(tmp_path: Path) -> None:
    files = private_files(metrics="off", finished=False)
    files["config.toml"] = CONFIG.format(metrics="unprotected", statistics="off")
    assert "not evaluated yet." in page(tmp_path, files).text


def test_before_the_first_round(tmp_path: Path) -> None:
    files = private_files(rounds=0, finished=False)
    text = page(tmp_path, files).text
    assert "No site has told yet what it has spent." in text
    assert "What epsilon says, and what not" in text
    assert "Epsilon by round" not in text


def test_under_masks_the_ledgers_have_it(tmp_path: Path) -> None:
    files = private_files()
    files["config.toml"] += "[secure-aggregation]\nenabled = true\n"
    for line in files["rounds.jsonl"]:
        del line["privacy"]
        line["secure"] = {"attempts": 1, "threshold": 6, "lost": [], "groups": [line["trained"]]}
    found = page(tmp_path, files)
    assert "each site's ledger has it, and the command fedge privacy ledger" in section(found)
    assert "what is spent stands in each site's ledger." in found.text
    assert "The server saw them as sums over several sites only" in section(found)
    assert "who took part and when" in section(found)
    assert "with how many examples" not in section(found)
    assert labels(found) == []
    assert "Epsilon of each site" not in found.text


@pytest.mark.parametrize("config", ['[task]\nname = "digits"\n', '[privacy]\nmechanism = "off"\n'])
def test_a_run_without_noise_has_nothing_of_it(tmp_path: Path, config: str) -> None:
    files = run_files()
    files["config.toml"] = config
    text = render(put(tmp_path / "run", files))
    for word in ('id="privacy"', "psilon", "Noise", "for privacy's sake"):
        assert word not in text


def test_figures_without_a_configuration_are_shown(tmp_path: Path) -> None:
    files = private_files()
    files["config.toml"] = "not = = toml"
    found = page(tmp_path, files)
    assert "single units of data. After round 12 the largest epsilon" in section(found)
    assert "noise multiplier–" in section(found)


def test_another_mechanism_is_named_and_not_explained(tmp_path: Path) -> None:
    files = private_files()
    evil = "<script>alert(1)</script>"
    files["config.toml"] = f"[privacy]\nmechanism = '{evil}'\nnoise-multiplier = 'much'\n"
    found = page(tmp_path, files)
    assert f"mechanism{evil}noise multiplier–" in section(found)
    assert "training example;" not in section(found)
    assert not any(tag == "script" for tag, _ in found.tags)


@pytest.mark.parametrize(
    "value", ["text", None, True, -0.5, 1.0000001e9, float("nan"), float("inf"), [1], {}]
)
def test_what_is_no_epsilon_is_no_figure(tmp_path: Path, value: object) -> None:
    files = private_files()
    for line in files["rounds.jsonl"]:
        line["privacy"]["site-1"]["consumers"] = value
    found = page(tmp_path, files)
    assert "is 6.00 against the model's readers and 12.0 against the server" in section(found)
    assert "site-1–––" in rows(found)
    assert not {"nan", "inf", "None"} & set(section(found).lower().split())


@pytest.mark.parametrize("told", [3, "x", None, [], {"site-1": 3}, {"site-1": {"server": 1.0}}])
def test_a_damaged_line_is_no_error(tmp_path: Path, told: object) -> None:
    files = private_files(rounds=3)
    files["rounds.jsonl"][1]["privacy"] = told
    assert "readers, largest over the sites, 3.00 at the end" in labels(page(tmp_path, files))[0]


def test_numbers_that_overflow_are_no_error(tmp_path: Path) -> None:
    files = private_files(rounds=3)
    folder = put(tmp_path / "run", files)
    lines = [json.dumps(line) for line in files["rounds.jsonl"]]
    lines[1] = lines[1].replace('"consumers": 2.0', '"consumers": 1e400')
    lines[2] = lines[2].replace('"server": 6.0', f'"server": 1{400 * "0"}')
    assert "1e400" in lines[1]
    (folder / "rounds.jsonl").write_text("\n".join(lines))
    found = Page(render(folder))
    assert "No figure came with the last update of site-1." in section(found)
    assert "site-11.00002.00001" in rows(found)


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e-11, 1e9])
def test_extreme_figures_can_be_drawn(tmp_path: Path, value: float) -> None:
    html = render(put(tmp_path / "run", tell(private_files(), value, value)))
    assert len(labels(Page(html))) == 1
    ticks = re.findall(r'<text class="tick"[^>]*>([^<]*)</text>', html)
    assert max(map(len, ticks)) <= 16
    drawn = "".join(re.findall(r" d=\"[^\"]*\"", html))
    assert not {"nan", "inf"} & set(re.findall("[a-z]+", drawn))


@pytest.mark.parametrize("rounds", [1, 12])
def test_one_site_and_one_round(tmp_path: Path, rounds: int) -> None:
    found = page(tmp_path, private_files(1, rounds))
    assert "One site tells it, at its own delta." in section(found)
    assert len(labels(found)) == 1


def test_where_the_sites_tell_their_delta_it_stands_beside_every_epsilon(tmp_path: Path) -> None:
    files = private_files()
    for line in files["rounds.jsonl"]:
        for epsilon in line.get("privacy", {}).values():
            epsilon["delta"] = 1e-6
    text = section(page(tmp_path, files))
    assert "over all runs, at delta 1e-06." in text
    assert "delta1e-06, the run's; a site's budget counts at its owner's" in text
    assert "All are at delta 1e-06; each ledger's budget counts at its owner's." in text
    assert "own delta" not in text
    assert "server, 24.0 at delta 1e-06" in text


def test_missing_rounds_are_bridged(tmp_path: Path) -> None:
    files = private_files(rounds=9)
    for line in files["rounds.jsonl"][2:6]:
        line |= {"outcome": "skipped", "trained": [], "examples": {}}
        del line["privacy"]
    del files["rounds.jsonl"][6]
    assert "9.00 at the end" in labels(page(tmp_path, files))[0]


@pytest.mark.slow
def test_thousands_of_sites(tmp_path: Path) -> None:
    found = page(tmp_path, private_files(2000, 2))
    assert f"The {MAX_ROWS} largest of 2000." in section(found)
    assert rows(found).index("site-1") < rows(found).index("site-2")
    assert rows(found).count("site-") == MAX_ROWS
    assert "The bands span all sites; the darker one is for the model's readers." in section(found)
    bands = [a["class"] for tag, a in found.tags if tag == "path" and "d" in a and "class" in a]
    assert bands.count("band inner") >= 2


def test_names_are_escaped(tmp_path: Path) -> None:
    files = private_files(rounds=2)
    evil = "<script>alert(1)</script>" + 500 * "x"
    for line in files["rounds.jsonl"]:
        line["privacy"][evil] = {"consumers": 9.0 / line["round"], "server": 99.0}
        line["trained"] = [*line["trained"], evil + "y"]
    assert "<script" not in render(put(tmp_path / "run", files))


def test_a_bound_never_reads_smaller_than_it_is() -> None:
    assert epsilon_text(6.9744) == "6.98"
    assert epsilon_text(3.16) == "3.16"
    assert epsilon_text(9.9999) == "10.0"
    assert epsilon_text(0.0123001) == "0.0124"
    assert epsilon_text(1200.2) == "1210"
    assert epsilon_text(0.0) == "0"
    # The failing twin: to the nearest, it would read 7.04.
    assert epsilon_text(7.0401) == "7.05"


def test_certainty_is_that_of_even_odds() -> None:
    assert certainty(0.0) == "at most 50.00\u202f% sure"
    assert certainty(math.log(3)) == "at most 75.00\u202f% sure"
    assert certainty(1.0) == "at most 73.11\u202f% sure"
    assert certainty(6.98) == "at most 99.91\u202f% sure"
    assert certainty(1e9).startswith("as good as certain")


def test_the_table_in_the_terminal_has_a_line() -> None:
    lines = private_files()["rounds.jsonl"]
    lines[-1]["privacy"]["site-1"]["server"] = float("nan")
    lines[-1]["privacy"]["site-2"] = "x"
    told = summary_table({}, lines).splitlines()
    of_an_earlier_run = "own deltas, unit unknown (largest of 8)"
    assert told[-1] == f"epsilon  readers 11.0000, server 22.0000, {of_an_earlier_run}"
    for line in lines:
        for epsilon in line["privacy"].values():
            if isinstance(epsilon, dict):
                epsilon["delta"] = 1e-6
    told = summary_table({}, lines, "example").splitlines()
    assert told[-1].endswith("server 22.0000, delta 1e-06, unit example (largest of 8)")
    tell({"rounds.jsonl": lines}, 1e9, 1e9)
    assert len(summary_table({}, lines).splitlines()[-1]) <= 80
    tell({"rounds.jsonl": lines}, 1e400, -1)
    assert "epsilon" not in summary_table({}, lines)
    assert "epsilon" not in summary_table({}, run_files()["rounds.jsonl"])
