"""The section on secure aggregation: what the server saw, dropouts, two pictures; nothing of it in plain runs."""

from __future__ import annotations

import random
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from fedge.server.report.heatmap import BINS, SHADES, greys, picture, scaled_bins
from fedge.server.report.page.render import render

from .test_render import Page, Run, page, put, run_files

NAMES = [f"site-{i}" for i in range(1, 9)]


def masked_files(rounds: int = 3, *, finished: bool = True) -> Run:
    """The files of a run under masks, as the server writes them: no site's own numbers anywhere."""
    files = run_files(rounds=rounds, finished=finished)
    for site in files["run.json"]["sites"].values():
        site |= {"train_examples": 0, "test_examples": 0, "rounds": rounds}
    for line in files["rounds.jsonl"]:
        line["metrics"] |= {"per_site": {}, "site_mean": {}}
        line["examples"] = {}
        line["secure"] = {
            "attempts": 1,
            "threshold": 6,
            "lost": [],
            "clipped": 0,
            "capped": 0,
            "saturated": 0,
            "groups": [NAMES],
            "evaluation": {"sites": 8, "attempts": 1, "lost": [], "reason": None},
        }
    if finished:
        files["metrics.json"]["final"] |= {"per_site": {}, "site_mean": {}}
    files["config.toml"] = "[secure-aggregation]\nenabled = true\n"
    draw = random.Random(1)
    files["seen.json"] = {
        "round": rounds,
        "masked": [float(draw.randrange(2**32)) for _ in range(1024)],
        "opened": [draw.gauss(0, 0.01) for _ in range(1024)],
    }
    return files


def lost(site: str, exchange: str, attempt: int = 1, reason: str = "no reply") -> dict[str, Any]:
    return {"site": site, "exchange": exchange, "attempt": attempt, "reason": reason}


def row(found: Page, start: str) -> str:
    """The text of the table of exchanges from a round's row on."""
    table = found.text[found.text.rindex("How many sites answered") :]
    return table[table.index(start) :]


def test_what_the_server_saw(tmp_path: Path) -> None:
    text = page(tmp_path, masked_files()).text
    assert "3 rounds of 3 gave a sum that the server could open" in text
    assert "sums of updates opened3 in 3 rounds" in text
    assert "fewest sites in one8" in text
    assert "bytes each way2.00 MB to the sites and 1.00 MB from them a round" in text
    assert "sites lost at an exchange0" in text
    assert "only sums over 8 or more sites were opened" in text
    assert (
        "118888886000" in text
    )  # round, attempt, five exchanges beside who was asked, threshold, counts
    assert "evaluations opened3 of 3, over 8 or more sites" in text
    assert "Lost on the way" not in text


def test_a_masked_run_has_pooled_results_and_no_table_of_dashes(tmp_path: Path) -> None:
    found = page(tmp_path, masked_files())
    assert "in 3 rounds: 90.1 % pooled accuracy." in found.text
    assert "Measured over all sites' held-out examples together: accuracy of 90.1 %." in found.text
    assert "No site has been evaluated" not in found.text
    assert "site mean" not in found.text.replace("Site mean", "").replace(
        "The mean of the sites'", ""
    )
    assert "training examples" not in found.text
    assert "–" not in re.sub(r"Words used here.*", "", found.text)
    assert "all sites' together" in found.text
    assert "evaluation 0.500" in found.text


def test_who_was_lost_where(tmp_path: Path) -> None:
    files = masked_files()
    first = files["rounds.jsonl"][0]
    first["secure"] |= {
        "lost": [
            lost("site-8", "begin"),
            lost("site-7", "share", reason="FE-421 a site's key is not valid in the signed roster"),
            lost("site-1", "unmask"),
        ],
        "groups": [NAMES[:6]],
        "clipped": 2,
        "saturated": 17,
    }
    first["trained"] = NAMES[:6]
    found = page(tmp_path, files)
    assert "fewest sites in one6" in found.text
    assert "updates clipped2" in found.text
    assert "values saturated17" in found.text
    assert "1update1site-7shareFE-421 a site's key is not valid in the signed roster" in found.text
    # Eight asked, seven keys, six shares, six vectors, six signatures, five who opened.
    assert row(found, "11876665").startswith("11876665" + "6" + "2017")


def test_a_loss_in_an_earlier_attempt_counts_for_that_attempt_only(tmp_path: Path) -> None:
    files = masked_files(rounds=1)
    files["rounds.jsonl"][0]["secure"] |= {
        "attempts": 2,
        "lost": [lost(site, "share", 1) for site in NAMES[:3]],
    }
    found = page(tmp_path, files)
    assert "attempts2, 1 of them again, with new keys" in found.text
    assert row(found, "12888888").startswith("12888888" + "6")


def test_a_round_without_a_sum_has_its_reason_and_no_numbers(tmp_path: Path) -> None:
    files = masked_files()
    last = files["rounds.jsonl"][-1]
    reason = "FE-510 secure sums: must be 1, got 0 (share: must be answered by 6 sites, got 5)"
    last |= {"outcome": "skipped", "reason": reason, "trained": []}
    last["secure"] = {
        "attempts": 3,
        "threshold": None,
        "lost": [lost("site-2", "share", 3)],
        "groups": [],
    }
    found = page(tmp_path, files)
    assert "2 rounds of 3 gave a sum" in found.text
    assert "attempts5, 2 of them again, with new keys" in found.text
    assert row(found, "338").startswith("338" + 9 * "–")
    assert reason in found.text


def test_a_site_that_is_left_out_of_a_retry_was_not_asked_again(tmp_path: Path) -> None:
    files = masked_files(rounds=1)
    out = "left out, as 3 sites find fault with it"
    told = [*(lost(site, "masked") for site in NAMES[:3]), lost("site-8", "masked", 1, out)]
    files["rounds.jsonl"][0]["secure"] |= {"attempts": 2, "lost": told, "groups": [NAMES[:7]]}
    found = page(tmp_path, files)
    assert row(found, "12777777").startswith("12777777" + "6")
    assert out in found.text


def test_an_evaluation_that_was_not_opened_is_told(tmp_path: Path) -> None:
    files = masked_files()
    files["rounds.jsonl"][1]["secure"]["evaluation"] = {
        "sites": 0,
        "attempts": 3,
        "lost": [lost("site-2", "commit", 3)],
        "reason": "commit: must be answered by 6 sites, got 5",
    }
    files["rounds.jsonl"][1]["metrics"]["pooled"] = {}
    files["rounds.jsonl"][2]["secure"]["evaluation"]["sites"] = 7
    text = page(tmp_path, files).text
    assert "evaluations opened2 of 3, over 7 or more sites" in text
    assert "evaluations not openedround 2: commit: must be answered by 6 sites, got 5" in text
    assert "2evaluation3site-2commitno reply" in text
    assert "only sums over 7 or more sites were opened" in text


def test_a_round_that_only_evaluated_has_no_row_of_exchanges(tmp_path: Path) -> None:
    files = masked_files()
    last = files["rounds.jsonl"][-1]
    last |= {
        "outcome": "skipped",
        "reason": "FE-501 sites: must be at least 5, got 4",
        "trained": [],
    }
    last["secure"] = {"evaluation": last["secure"]["evaluation"]}
    found = page(tmp_path, files)
    assert "2 rounds of 3 gave a sum" in found.text
    assert "attempts2fewest" not in found.text
    assert "338" not in row(found, "21888888")


def test_no_sum_at_all_is_said(tmp_path: Path) -> None:
    files = masked_files(rounds=1, finished=False)
    files["rounds.jsonl"][0]["secure"] = {
        "attempts": 3,
        "threshold": None,
        "lost": [],
        "groups": [],
    }
    del files["seen.json"]
    text = page(tmp_path, files).text
    assert "no sum was opened" in text
    assert "fewest sites in one–" in text


def test_groups_are_named(tmp_path: Path) -> None:
    files = masked_files()
    for line in files["rounds.jsonl"]:
        line["secure"]["groups"] = [NAMES[:3], NAMES[3:6], NAMES[6:]]
    text = page(tmp_path, files).text
    assert "Groups of round 3" in text
    assert "group 2site-4, site-5, site-6" in text
    assert "sums of updates opened9 in 3 rounds, 3 groups in each" in text
    assert "fewest sites in one2" in text


def test_two_pictures_side_by_side_that_load_nothing(tmp_path: Path) -> None:
    found = page(tmp_path, masked_files())
    labels = [a["aria-label"] for tag, a in found.tags if a.get("class") == "greys"]
    assert labels == [
        "One site's vector of round 3, as it came: 1024 values as shades of grey",
        "The sum of round 3, opened: 1024 values as shades of grey",
    ]
    assert "The masks are still on" in found.text
    assert "proves nothing" in found.text
    assert not any(tag in ("img", "script", "link") for tag, _ in found.tags)


@pytest.mark.parametrize(
    "seen",
    [
        {},
        {"masked": [], "opened": []},
        {"masked": [1.0], "opened": "x"},
        {"masked": [float("nan"), None], "opened": [True]},
    ],
)
def test_without_values_there_are_no_pictures(tmp_path: Path, seen: Run) -> None:
    found = page(tmp_path, {**masked_files(), "seen.json": seen})
    assert not any(a.get("class") == "greys" for _, a in found.tags)
    assert "What the server saw" in found.text


def test_one_value_and_only_zeros_can_be_drawn(tmp_path: Path) -> None:
    seen = {"round": 1, "masked": [5.0], "opened": [0.0]}
    found = page(tmp_path, {**masked_files(), "seen.json": seen})
    assert sum(a.get("class") == "greys" for _, a in found.tags) == 2


def test_names_and_reasons_are_escaped(tmp_path: Path) -> None:
    files = masked_files()
    evil = "<script>alert(1)</script>"
    files["rounds.jsonl"][0]["secure"]["lost"] = [lost(evil, evil, 1, evil)]
    files["rounds.jsonl"][2]["secure"]["groups"] = [[evil], NAMES]
    assert "<script" not in render(put(tmp_path / "run", files))


@pytest.mark.parametrize(
    "line", [{"lost": 3, "groups": "x", "attempts": "y"}, {"lost": [None], "groups": [None, [1]]}]
)
def test_a_damaged_line_is_no_error(tmp_path: Path, line: Run) -> None:
    files = masked_files()
    files["rounds.jsonl"][1]["secure"] = line
    assert "Masked sums" in page(tmp_path, files).text


def test_a_plain_run_has_nothing_of_it(tmp_path: Path) -> None:
    files = run_files()
    files["config.toml"] = "[secure-aggregation]\nenabled = false\n"
    files["seen.json"] = {"round": 1, "masked": [1.0], "opened": [1.0]}
    text = render(put(tmp_path / "run", files))
    for word in ("greys", "Masked", 'id="secure"', "Saturated"):
        assert word not in text


def test_shades_span_the_range() -> None:
    assert greys([0.0, 0.5, 1.0, -9.0, 9.0], 0.0, 1.0) == [
        0,
        SHADES // 2,
        SHADES - 1,
        0,
        SHADES - 1,
    ]
    assert sum(scaled_bins([0.1] * 7, 0.0, 1.0)) == 7
    assert scaled_bins([1.0], 0.0, 1.0)[BINS - 1] == 1


def test_a_picture_has_each_value_once() -> None:
    drawn = picture("noise", [i % SHADES for i in range(1000)])
    assert drawn.count("h1v1h-1z") == 1000
    assert 'viewBox="0 0 32 32"' in drawn
    assert picture("none", []) == ""
    assert 'viewBox="0 0 3 2"' in picture("five", [1] * 5)


def test_its_colours_are_those_of_the_page() -> None:
    read = resources.files("fedge.server.report").joinpath
    named = set(re.findall(r"--([a-z-]+):", read("page.css").read_text(encoding="utf-8")))
    assert set(re.findall(r"var\(--([a-z-]+)\)", read("secure.css").read_text("utf-8"))) <= named
