"""Metrics with noise: a figure comes with its noise, or is shown as lost in it; no site counts as not evaluated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedge.server.report.noised_figures import parsed, shown, spread
from fedge.simulations.terminal.summary import summary_table
from fedge.simulations.terminal.text import round_facts

from .page.test_render import Page, Run, page, run_files
from .page.test_secure_aggregation import masked_files

CONFIG = """[privacy]
mechanism = "{mechanism}"
noise-multiplier = 1.0
metrics = "noised"
metrics-noise-multiplier = 1.0
"""


def noise(unit: str, stddev: float, sites: Any = ()) -> dict[str, Any]:
    own = {s: {"accuracy": 2 * stddev} for s in sites} if unit == "example" else {}
    values = {"accuracy": stddev}
    return {"unit": unit, "per_site": own, "site_mean": {**values}, "pooled": {**values}}


def noised_files(unit: str, stddev: float) -> Run:
    """The files of a run whose sites put noise on their counts, as the server writes them."""
    found = run_files(8, 4, finished=True)
    for told in (
        *(line["metrics"] for line in found["rounds.jsonl"]),
        found["metrics.json"]["final"],
    ):
        for values in told["per_site"].values():
            values.pop("loss", None)
        for view in ("site_mean", "pooled"):
            told[view] = {"accuracy": 0.9}
        if unit == "site":
            told["per_site"] = {}
        told["noise"] = noise(unit, stddev, told["per_site"])
        if "train" in told:
            told["train"] = {}
    mechanism = "example" if unit == "example" else "local"
    found["config.toml"] = CONFIG.format(mechanism=mechanism)
    return found


def chart(found: Page) -> str:
    return next(
        a["aria-label"] or ""
        for tag, a in found.tags
        if tag == "svg" and (a.get("aria-label") or "").startswith("Accuracy (%) by round")
    )


def test_a_figure_comes_with_its_noise(tmp_path: Path) -> None:
    found = page(tmp_path, noised_files("site", 0.031))
    text = found.text
    figure = "90.0 % ± 3.1"
    assert f"in 4 rounds: {figure} accuracy, every site alike (± is the standard deviation" in text
    assert f"together, every site alike: accuracy of {figure}" in text
    assert f"pooled, {figure} at the end" in chart(found).replace("\u202f", " ")
    assert "one standard deviation of it either way" in text
    assert "No site has been evaluated" not in text
    assert "Not evaluated" not in text
    # The failing twin: a figure that stands by itself.
    assert not re.search(r"90\.0 %(?! ±)", text)


def test_a_figure_lost_in_noise_is_none(tmp_path: Path) -> None:
    text = page(tmp_path, noised_files("site", 0.354)).text
    assert "in 4 rounds: accuracy lost in noise." in text
    assert "every site alike: accuracy is lost in noise." in text
    assert "90.0" not in text
    assert "No site has been evaluated" not in text


def test_each_sites_own_has_more_noise_than_all_together(tmp_path: Path) -> None:
    text = page(tmp_path, noised_files("example", 0.05)).text
    assert "in 4 rounds: 90.0 % ± 5.0 site mean and 90.0 % ± 5.0 pooled accuracy" in text
    assert "of a standard deviation of up to 10.0 points" in text
    (tmp_path / "more").mkdir()
    lost = page(tmp_path / "more", noised_files("example", 0.2)).text
    assert "Each site's own result is lost in noise." in lost
    assert "90.0 % ± 20.0" in lost


def test_under_masks(tmp_path: Path) -> None:
    files = masked_files()
    for told in (
        *(line["metrics"] for line in files["rounds.jsonl"]),
        files["metrics.json"]["final"],
    ):
        told["pooled"] = {"accuracy": 1.0}
        told["noise"] = noise("site", 0.4)
    text = page(tmp_path, files).text
    assert "100.0" not in text[: text.index("Masked sums")]
    assert "accuracy lost in noise" in text


def test_exact_figures_stay_as_they_are(tmp_path: Path) -> None:
    text = page(tmp_path, run_files()).text
    assert "±" not in text
    assert "lost in noise" not in text
    assert shown("accuracy", 0.5, None) == "50.0\u202f%"


def test_noise_does_not_read_smaller_than_it_is() -> None:
    assert spread("accuracy", 1e-9) == "0.1"
    assert spread("accuracy", 0.05) == "5.0"
    assert spread("accuracy", 0.0501) == "5.1"
    assert spread("sensitivity", 0.0501) == "0.051"
    # Noise of which no figure is known hides all, and so does a damaged one.
    assert (
        shown("accuracy", 0.9, parsed({"unit": "site"}).stddev("pooled", "accuracy"))
        == "lost in noise"
    )
    assert shown("accuracy", 0.9, float("nan")) == "lost in noise"


@pytest.mark.parametrize("unit", ["site", "example"])
def test_the_terminal(unit: str) -> None:
    files = noised_files(unit, 0.031)
    assert "90.0 % ± 3.1" in round_facts(files["rounds.jsonl"][-1])
    table = summary_table(files["metrics.json"], files["rounds.jsonl"])
    assert "90.0 % ± 3.1" in table
    assert ("all sites" in table) == (unit == "site")
    assert max(map(len, table.splitlines())) <= 80
    files = noised_files(unit, 0.3)
    assert "accuracy lost in noise" in round_facts(files["rounds.jsonl"][-1])
    table = summary_table(files["metrics.json"], files["rounds.jsonl"])
    assert "%" not in table
    assert "▁" not in table.splitlines()[-1]


def epsilon_files(more: str = "") -> Run:
    """A run with distributed noise, as the server writes it."""
    files = masked_files()
    for line in files["rounds.jsonl"]:
        line["metrics"]["train"] = {}
        value = 1.5 * line["round"]
        line["masked_epsilon"] = {
            "delta": 1e-5,
            "consumers": value,
            "sample_known": value,
            "updates": line["round"],
            "evaluations": 0,
        }
    files["config.toml"] += (
        f'[privacy]\nmechanism = "distributed"\nnoise-multiplier = 4.0\nmetrics = "off"\n{more}'
    )
    return files


def test_the_server_reckons_distributed_noise(tmp_path: Path) -> None:
    found = page(tmp_path, epsilon_files())
    text = found.text
    assert (
        "After round 3 this run alone has cost a site epsilon 4.50 against the model's readers"
        in text
    )
    assert "at most, at delta 1e-05, by the server's reckoning" in text
    assert "unbounded" not in text
    assert [
        a["aria-label"]
        for tag, a in found.tags
        if tag == "svg" and a.get("width") == "540" and "readers" in (a.get("aria-label") or "")
    ] == ["Epsilon by round: both readers, 4.50 at the end"]
    lines = epsilon_files()["rounds.jsonl"]
    assert "epsilon  4.5000, delta 1e-05, unit site: this run alone" in summary_table(
        {}, lines, "site"
    )


def test_single_examples_under_masks_stand_in_the_ledgers(tmp_path: Path) -> None:
    files = epsilon_files()
    for line in files["rounds.jsonl"]:
        del line["masked_epsilon"]
    files["config.toml"] = files["config.toml"].replace("distributed", "example")
    text = page(tmp_path, files).text
    assert "each site's ledger has it, and the command fedge privacy ledger prints it there" in text
    assert "this run alone" not in text


def test_a_sites_figure_that_is_lost_is_not_drawn(tmp_path: Path) -> None:
    files = noised_files("example", 0.05)
    final = files["metrics.json"]["final"]
    final["per_site"]["site-1"]["accuracy"] = 0.123
    final["noise"]["per_site"]["site-1"] = {"accuracy": 0.9}
    text = page(tmp_path, files).text
    assert "at 1 of 8 the result is lost in noise" in text
    assert "1 more site is lost in noise" in text
    assert "12.3 %" not in text
