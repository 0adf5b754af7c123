"""Figures and times in words."""

from __future__ import annotations

from fedge.simulations.terminal.text import clock, round_facts, sparkline

from ..shown import line


def test_facts_of_a_round() -> None:
    assert round_facts(line(2)) == "56.0 %  loss 0.500  8/8 sites"
    refused = [{"site": "site-1", "code": "FE-401", "outcome": "rejected", "reason": ""}]
    facts = round_facts(
        line(2, rejected=refused, trained=["site-2"], outcome="skipped", metrics={})
    )
    assert facts == "1/8 sites  1 not counted  skipped"
    assert "nan" not in round_facts(line(2, metrics={"train": {"loss": float("nan")}}))


def test_sparkline() -> None:
    assert sparkline([0, 1], 0, 1) == "▁█"
    assert sparkline([0.5] * 3, 0.5, 0.5) == "███"
    assert len(sparkline([i / 1000 for i in range(1000)], 0, 1)) == 20
    assert sparkline([], 0, 1) == ""


def test_clock() -> None:
    assert [clock(s) for s in (-1, 7, 750, 3723)] == ["0:00", "0:07", "12:30", "1:02:03"]
