"""Noise of the server's in the report: curves with a secret and a known sample, none against the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedge.server.report.page.privacy_central import UNBOUNDED
from fedge.server.report.page.privacy_epsilon import spent
from fedge.server.report.run_data import read
from fedge.simulations.terminal.summary import summary_table

from .test_render import Page, Run, page, put, run_files

CONFIG = """[privacy]
mechanism = "{mechanism}"
noise-multiplier = 1.0
clipping-bound = 0.5
metrics = "off"
statistics = "off"
{more}
"""
WARNED = "who also learns who was drawn"


def files(mechanism: str = "central", more: str = "sampling-rate = 0.5", known: float = 2.0) -> Run:
    """A run as the server writes it: every site has been charged for all of it when it is first drawn."""
    found = run_files(8, 12, finished=True)
    for line in found["rounds.jsonl"]:
        line["metrics"]["train"] = {}
        line["invited"] = line["trained"] = line["trained"][::2]
        line["privacy"] = {s: {"consumers": 6.0, "server": None} for s in line["trained"]}
        epsilon = {"delta": 1e-5, "consumers": line["round"] / 2}
        line["central"] = {
            "clipping_bound": 0.5,
            "fraction_within": None,
            "noise_multiplier": 1.0,
            "epsilon": {**epsilon, "sample_known": known * line["round"] / 2},
        }
    found["config.toml"] = CONFIG.format(mechanism=mechanism, more=more)
    return found


def label(found: Page) -> str:
    (only,) = (
        a["aria-label"] or ""
        for tag, a in found.tags
        if tag == "svg" and a.get("width") == "540" and "readers" in (a["aria-label"] or "")
    )
    return only


def test_both_readers_have_a_curve_by_round(tmp_path: Path) -> None:
    found = page(tmp_path, files())
    assert label(found) == (
        f"Epsilon by round: model's readers, 6.00 at the end; {WARNED}, 12.0 at the end"
    )
    assert "Of this run alone, at delta 1e-05, as the server reckons it" in found.text
    assert "keep this report and the run directory from them" in found.text


def test_where_nobody_is_drawn_there_is_one_curve(tmp_path: Path) -> None:
    found = page(tmp_path, files("central-mf", "min-separation = 2", known=1.0))
    assert label(found) == "Epsilon by round: model's readers, 6.00 at the end"
    assert WARNED not in found.text
    assert "the sites take turns, each every 2 rounds" in found.text
    assert "keep this report" not in found.text


def test_nothing_bounds_what_the_server_learns(tmp_path: Path) -> None:
    found = page(tmp_path, files())
    text = found.text
    assert f"6.00 against the model's readers; against the server it is {UNBOUNDED}" in text
    assert "site-16.0000unbounded12" in text
    assert "a whole site: all that it has" in text
    assert "clipping bound0.5: greatest length (L2 norm) of one site's update" in text
    assert "what can be found out about one site, delta apart" in text
    assert not {"inf", "nan"} & set(text.lower().split())
    told = spent(read(tmp_path / "run"))
    assert told.largest[-1].server == float("inf")


def test_who_was_not_drawn_was_not_away(tmp_path: Path) -> None:
    for more in ("sampling-rate = 0.5", "min-separation = 2"):
        assert "not connected" not in page(tmp_path, files(more=more)).text
    # The failing twin: without a draw, a site that was not invited was not there.
    assert "not connected" in page(tmp_path, files(more="sampling-rate = 1.0")).text


@pytest.mark.parametrize(
    "central", [None, 3, [], {}, {"epsilon": 1}, {"epsilon": {"consumers": 1}}]
)
def test_a_line_without_it_is_no_error(tmp_path: Path, central: Any) -> None:
    damaged = files()
    for line in damaged["rounds.jsonl"]:
        line["central"] = central
    found = page(tmp_path, damaged)
    # What the sites say is left, and only the readers' of it can be drawn.
    assert (
        label(found) == "Epsilon by round: model's readers, largest over the sites, 6.00 at the end"
    )


def test_null_is_infinity_of_the_servers_alone(tmp_path: Path) -> None:
    damaged = files()
    for line in damaged["rounds.jsonl"]:
        line["privacy"]["site-1"] = {"consumers": None, "server": None}
        line["privacy"]["site-3"] = {"consumers": 1.0}
    told = spent(read(put(tmp_path / "run", damaged)))
    assert set(told.sites) == {"site-5", "site-7"}


def test_the_terminal_says_so_too() -> None:
    lines = files()["rounds.jsonl"]
    assert "readers 6.0000, server unbounded, own deltas, unit" in summary_table({}, lines)
