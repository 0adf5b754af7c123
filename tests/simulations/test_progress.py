"""What is printed while a run goes on, and at its end."""

from __future__ import annotations

import io
import os
import re
import select
import sys
from typing import Any

import pytest

from fedge.simulations.progress import (
    Progress,
    absences,
    clock,
    round_facts,
    sparkline,
    summary_table,
)


def line(number: int, sites: int = 8, **changes: Any) -> dict[str, Any]:
    names = [f"site-{i}" for i in range(1, sites + 1)]
    per_site = {
        s: {"accuracy": min(1.0, 0.5 + 0.03 * number + 0.001 * i), "loss": 0.3}
        for i, s in enumerate(names)
    }
    return {
        "round": number,
        "outcome": "committed",
        "invited": names,
        "trained": names,
        "rejected": [],
        "metrics": {
            "train": {"loss": 1 / number},
            "per_site": per_site,
            "site_mean": {"accuracy": 0.5 + 0.03 * number, "loss": 0.3},
            "pooled": {"accuracy": 0.91, "loss": 0.3},
        },
        "examples": dict.fromkeys(names, 100),
        "seconds": 1.0,
    } | changes


def totals(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {"final": {k: lines[-1]["metrics"][k] for k in ("per_site", "site_mean", "pooled")}}


def run(rounds: int, *, quiet: bool = False, done: int = 0) -> list[str]:
    out = io.StringIO()
    with Progress(quiet=quiet, file=out) as progress:
        progress.start(rounds, done)
        for number in range(done + 1, rounds + 1):
            for i in range(1, 9):
                progress.site(number, f"site-{i}", i, 8)
            progress.round(line(number))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("rounds", [1, 3, 12, 100, 257])
def test_few_plain_lines_where_there_is_no_terminal(rounds: int) -> None:
    printed = run(rounds)
    assert 1 <= len(printed) <= min(rounds, 5)
    assert printed[-1].startswith(f"round {rounds}/{rounds}")
    assert not any("\x1b" in p for p in printed)


def test_a_resumed_run_goes_on_where_it_was() -> None:
    printed = run(10, done=8)
    assert [p.split()[1] for p in printed] == ["9/10", "10/10"]


def test_quiet_prints_nothing() -> None:
    assert run(12, quiet=True) == []


def test_facts_of_a_round() -> None:
    assert round_facts(line(2)) == "56.0 %  loss 0.500  8/8 sites"
    refused = [{"site": "site-1", "code": "FE-401", "outcome": "rejected", "reason": ""}]
    facts = round_facts(
        line(2, rejected=refused, trained=["site-2"], outcome="skipped", metrics={})
    )
    assert facts == "1/8 sites  1 not counted  skipped"
    assert "nan" not in round_facts(line(2, metrics={"train": {"loss": float("nan")}}))


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_gets_one_bar() -> None:
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        with Progress(file=terminal) as progress:
            progress.start(2)
            progress.site(1, "site-1", 1, 8)
            progress.round(line(1))
            progress.round(line(2, rejected=[{"site": "[red]x[/red]", "outcome": "late"}]))
        shown = b""
        while select.select([reader], [], [], 0.2)[0]:
            shown += os.read(reader, 65_536)
    os.close(reader)
    text = shown.decode()
    assert "round 2/2" in text
    assert "56.0 %" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert plain.count("\n") <= 2  # the bar is one line, drawn over


def test_the_bar_stops_where_the_run_fails() -> None:
    out = io.StringIO()
    with pytest.raises(RuntimeError), Progress(file=out, terminal=True) as progress:
        progress.start(3)
        raise RuntimeError
    assert out.getvalue().count("\x1b[?25h") == 1  # the cursor is back


@pytest.mark.parametrize(("sites", "most"), [(1, 4), (8, 14), (12, 16), (13, 12), (300, 12)])
def test_summary_fits(sites: int, most: int) -> None:
    lines = [line(n, sites) for n in range(1, 61)]
    text = summary_table(totals(lines), lines).splitlines()
    assert len(text) <= most
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


def test_sparkline() -> None:
    assert sparkline([0, 1], 0, 1) == "▁█"
    assert sparkline([0.5] * 3, 0.5, 0.5) == "███"
    assert len(sparkline([i / 1000 for i in range(1000)], 0, 1)) == 20
    assert sparkline([], 0, 1) == ""


def test_clock() -> None:
    assert [clock(s) for s in (-1, 7, 750, 3723)] == ["0:00", "0:07", "12:30", "1:02:03"]


def test_waiting_and_lost_sites_are_told_in_plain_lines() -> None:
    out = io.StringIO()
    with Progress(file=out, terminal=False) as progress:
        progress.waiting(0, "connect", [], 12.0)
        progress.start(4)
        progress.sent(2, 1, 3, 10**7)
        progress.waiting(2, "train", ["site-3", "site-4"], 30.0)
        progress.waiting(2, "superlink", ["site-3"], 40.0)
        progress.lost(2, "si\x1bte-3", 65.0)
        progress.back(2, "site-3", 90.0)
    assert out.getvalue().splitlines() == [
        "start  waiting for sites to connect (0:12)",
        "round 2/4  waiting for site-3 and 1 more (0:30)",
        "round 2/4  waiting for the SuperLink (0:40)",
        "round 2/4  si?te-3 is not connected",
        "round 2/4  site-3 is back after 1:30",
    ]


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
    told = summary_table(totals(lines), lines).splitlines()
    assert told[-4:] == [
        "round 2: 1 of 4 counted",
        "  site-2 absent, not connected for 90 s",
        "  site-3 late",
        "  site-4 absent, not invited: not connected for 9 s",
    ]
    assert all(len(row) <= 80 for row in told)
    many = [line(i, 3, trained=["site-0"], rejected=missing["rejected"]) for i in range(1, 50)]
    assert len(absences(many)) == 13


@pytest.mark.parametrize(
    "rejected", [[3], [{"site": 4, "outcome": "absent"}], [{"site": "a", "outcome": None}], None]
)
def test_hostile_rejections_are_left_out_of_the_table(rejected: Any) -> None:
    assert absences([line(1, 3, rejected=rejected)]) == []
