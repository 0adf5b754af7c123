"""What is printed at a run's end."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fedge.simulations.terminal.summary import absences, summary_table

from ..shown import line


def totals(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {"final": {k: lines[-1]["metrics"][k] for k in ("per_site", "site_mean", "pooled")}}


@pytest.mark.parametrize(("sites", "max_lines"), [(1, 4), (8, 14), (12, 16), (13, 12), (300, 12)])
def test_summary_fits(sites: int, max_lines: int) -> None:
    lines = [line(n, sites) for n in range(1, 61)]
    text = summary_table(totals(lines), lines).splitlines()
    assert len(text) <= max_lines
    assert max(map(len, text)) <= 80
    assert text[-2].startswith("site mean")
    assert text[-1].startswith("pooled")
    assert "91.0 %" in text[-1]


def test_summary_of_many_sites_shows_both_ends() -> None:
    lines = [line(5, 40)]
    text = summary_table(totals(lines), lines)
    assert "… 32 sites in between" in text
    assert re.search(r"^site-1 ", text, re.M)
    assert re.search(r"^site-40 ", text, re.M)
    assert not re.search(r"^site-20 ", text, re.M)


def without(lines: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The last evaluation lacks these sites."""
    for name in names:
        del lines[-1]["metrics"]["per_site"][name]
    return lines


def test_summary_names_the_sites_that_were_not_evaluated() -> None:
    lines = without([line(1), line(2)], "site-5", "site-8")
    lines[-1]["rejected"] = [{"site": "site-9", "code": "FE-409", "outcome": "absent"}]
    text = summary_table(totals(lines), lines)
    assert text.splitlines()[0].split()[:4] == ["site", "trained", "on", "accuracy"]
    assert re.findall(r"^(\S+) +(\S+)  not evaluated$", text, re.M) == [
        ("site-5", "100"),
        ("site-8", "100"),
        ("site-9", "–"),
    ]
    assert "not evaluated" not in summary_table(totals([line(1)]), [line(1)])


def test_summary_of_many_sites_counts_those_not_evaluated() -> None:
    lines = without([line(5, 40)], *(f"site-{i}" for i in range(20, 30)))
    text = summary_table(totals(lines), lines)
    assert "… 22 sites in between" in text
    assert len(re.findall(r"–|not evaluated$", text, re.M)) == 5
    assert "… 6 more not evaluated" in text


def test_summary_of_hostile_names() -> None:
    lines = [line(1)]
    per_site = {
        "\x1b[2J" + "x" * 90: {"accuracy": float("nan")},
        "b": "no object",
        "c": {"accuracy": 1.0},
    }
    text = summary_table({"final": {"per_site": per_site, "site_mean": {"accuracy": 0.5}}}, lines)
    assert "\x1b" not in text
    assert "nan" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_summary_without_evaluation() -> None:
    assert summary_table({}, []).splitlines()[-1].startswith("pooled")


def test_the_table_names_who_was_missing_and_why() -> None:
    missing = line(
        2,
        3,
        invited=["site-1", "site-2", "site-3"],
        trained=["site-1"],
        rejected=[
            {"site": "site-2", "outcome": "absent", "reason": "not connected for 90 s"},
            {"site": "site-3", "outcome": "late", "reason": "reply after the deadline"},
            {"site": "site-4", "outcome": "absent", "reason": "not invited: not connected for 9 s"},
        ],
    )
    lines = [line(1, 3), missing]
    rows_shown = summary_table(totals(lines), lines).splitlines()
    assert rows_shown[-4:] == [
        "round 2: 1 of 4 counted",
        "  site-2 absent, not connected for 90 s",
        "  site-3 late",
        "  site-4 absent, not invited: not connected for 9 s",
    ]
    assert all(len(row) <= 80 for row in rows_shown)
    many = [line(i, 3, trained=["site-0"], rejected=missing["rejected"]) for i in range(1, 50)]
    assert len(absences(many)) == 13


@pytest.mark.parametrize(
    "rejected", [[3], [{"site": 4, "outcome": "absent"}], [{"site": "a", "outcome": None}], None]
)
def test_hostile_rejections_are_left_out_of_the_table(rejected: Any) -> None:
    assert absences([line(1, 3, rejected=rejected)]) == []
