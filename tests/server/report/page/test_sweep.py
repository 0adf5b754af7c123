"""Accuracy against epsilon in a run's report: where it is drawn, and what is read of a damaged file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.server.report.page.render import render
from fedge.server.report.page.sweep import chart, failures, log_ticks, parse, table, words

from .test_render import page, put, run_files

PAIRS = {0.5: (12.0, 0.9), 1.0: (4.0, 0.8), 4.0: (0.7, 0.5)}


def found(pairs: dict[float, tuple[float, float]] = PAIRS, **changed: Any) -> dict[str, Any]:
    """A sweep.json: each noise multiplier's epsilon and accuracy, with two seeds."""
    points = []
    for noise, (epsilon, mean) in pairs.items():
        both = {"consumers": epsilon, "server": epsilon}
        runs = [
            {"run": f"n{noise:g}-{s}", "id": f"id-{noise:g}-{s}", "seed": s, "value": v, "problem": None}
            for s, v in ((1, mean - 0.05), (2, mean + 0.05))
        ]  # fmt: skip
        points.append(
            {
                "noise_multiplier": noise, "epsilon": both, "mean": mean,
                "lowest": mean - 0.05, "highest": mean + 0.05, "runs": runs,
            }
        )  # fmt: skip
    base = {"run": "baseline", "id": "id-base", "seed": 1, "value": 0.95, "problem": None}
    return {
        "task": "digits", "mechanism": "example", "unit": "example", "delta": 1e-5,
        "metric": "accuracy", "rounds": 4, "seeds": [1, 2], "baseline": base, "points": points,
    } | changed  # fmt: skip


def wide(html: str) -> str:
    """The chart for wide pages."""
    return html[html.index('<div class="wide">') : html.index('<div class="narrow">')]


def marks(html: str, css: str) -> list[tuple[float, float]]:
    """Where the points of a curve are drawn, in px."""
    groups = re.findall(rf'<g class="{css}">.*?</g>', wide(html))
    return [
        (float(x), float(y))
        for group in groups
        for x, y in re.findall(r'cx="([-0-9.]+)" cy="([-0-9.]+)"', group)
    ]


def test_points_lie_by_the_logarithm_of_epsilon() -> None:
    drawn = chart(parse(found()))
    points = marks(drawn, "mean")
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert y0 > y1 > y2
    assert (x2 - x1) / (x1 - x0) == pytest.approx(math.log(12 / 4) / math.log(4 / 0.7), rel=0.01)
    # Both ends of each bar, from the picture's own scale: 10 points of accuracy between them.
    bars = re.findall(r'class="span" d="M([0-9.]+) ([0-9.]+)V([0-9.]+)M', wide(drawn))
    assert [float(x) for x, _, _ in bars] == pytest.approx([x2, x1, x0], abs=0.2)
    scale = (y0 - y2) / 40
    for _, low, high in bars:
        assert float(low) - float(high) == pytest.approx(10 * scale, abs=0.2)
    assert 'stroke="none"' not in drawn
    assert "no noise 95.0" in drawn
    assert "same for the model&#x27;s readers and for the server" in drawn
    assert not marks(drawn, "train")


def test_two_readers_have_two_curves_and_two_columns() -> None:
    apart = found()
    for point in apart["points"]:
        point["epsilon"]["server"] = 3 * point["epsilon"]["consumers"]
    sweep = parse(apart)
    drawn = chart(sweep)
    assert len(marks(drawn, "mean")) == len(marks(drawn, "pooled")) == 3
    assert marks(drawn, "pooled")[0][0] > marks(drawn, "mean")[0][0]
    assert "epsilon, readers" in table(sweep)
    assert "36.0" in table(sweep)


def test_a_server_that_nothing_bounds_is_said_and_not_drawn() -> None:
    central = found(mechanism="central", unit="site")
    for point in central["points"]:
        point["epsilon"]["server"] = None
    sweep = parse(central)
    drawn = chart(sweep)
    assert len(marks(drawn, "mean")) == 3
    assert not marks(drawn, "pooled")
    assert (
        "server gets the updates before the noise, so that nothing bounds what it learns" in drawn
    )
    assert table(sweep).count("unbounded") == 3


def test_failed_runs_are_listed_and_have_no_part_in_the_curve() -> None:
    broken = found()
    broken["points"][1] |= {"mean": None, "lowest": None, "highest": None}
    broken["points"][1]["epsilon"] = {"consumers": None, "server": None}
    for trial in broken["points"][1]["runs"]:
        trial |= {"value": None, "problem": "FE-503 <b>no</b>"}
    sweep = parse(broken)
    assert len(marks(chart(sweep), "mean")) == 2
    assert "2 runs without a figure" in failures(sweep)
    assert failures(sweep).count("FE-503 &lt;b&gt;no") == 2
    assert failures(parse(found())) == ""


def test_no_run_with_a_figure_is_no_curve() -> None:
    sweep = parse(found({1.0: (2.0, 0.5)}, baseline={}))
    none = found({1.0: (2.0, 0.5)}, baseline={})
    none["points"][0] |= {"mean": None}
    assert chart(sweep)
    assert chart(parse(none)) == ""
    assert words(parse(none)) == "No run of the sweep has a figure"


def test_epsilon_of_zero_is_in_the_table_alone() -> None:
    sweep = parse(found({1.0: (2.0, 0.5), 1e4: (0.0, 0.1)}))
    assert len(marks(chart(sweep), "mean")) == 1
    assert "An epsilon of 0 has no place on this axis" in chart(sweep)


def test_a_runs_report_has_the_section_and_its_ring(tmp_path: Path) -> None:
    files = run_files(4, 2)
    files["sweep.json"] = found()
    own = files["run.json"]["run"]
    files["sweep.json"]["points"][1]["runs"][1]["id"] = own
    put(tmp_path, files)
    html = render(tmp_path)
    assert '<a href="#sweep">Sweep</a>' in html
    assert "This run is one of the 7 of a sweep: noise multiplier 1, seed 2." in html
    assert "The orange ring is this run." in html
    section = html[html.index('<section id="sweep">') :]
    (ring,) = marks(section, "pooled")
    line = marks(section, "mean")
    assert ring[0] == pytest.approx(line[1][0], abs=0.1)
    assert ring[1] < line[1][1]


def test_a_run_of_no_sweep_has_no_section(tmp_path: Path) -> None:
    assert "#sweep" not in str(page(tmp_path, run_files(4, 2)).tags)


@pytest.mark.parametrize(
    "content",
    [
        {}, [], 3, None, {"points": []}, {"points": [{}], "metric": "accuracy"},
        {"points": 3, "metric": "accuracy"}, {"points": [[]], "metric": 3},
    ],
)  # fmt: skip
def test_what_is_no_sweep_is_left_out(tmp_path: Path, content: Any) -> None:
    files = run_files(2, 1)
    put(tmp_path, files)
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    assert '<section id="sweep">' not in render(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
_KEYS = ("epsilon", "mean", "lowest", "highest", "runs", "noise_multiplier")


@pytest.mark.slow
@given(st.sampled_from(_KEYS), _JSON, st.sampled_from(("delta", "seeds", "baseline", "rounds")), _JSON)  # fmt: skip
def test_strange_values_are_drawn_or_left_out(key: str, one: Any, other: str, two: Any) -> None:
    strange = found(**{other: two})
    strange["points"][0][key] = one
    sweep = parse(strange)
    assert sweep is not None
    html = chart(sweep) + table(sweep) + failures(sweep) + words(sweep)
    assert "nan" not in html.lower().replace("finance", "")


@given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9), st.sampled_from((5, 6, 8)))
def test_ticks_enclose_what_is_drawn_and_are_few(a: float, b: float, most: int) -> None:
    low, high = min(a, b), max(a, b)
    ticks = log_ticks(low, high, most)
    assert ticks[0] <= low and high <= ticks[-1]
    assert 2 <= len(ticks) <= most
    assert ticks == sorted(set(ticks))


def test_ticks_are_round() -> None:
    assert log_ticks(0.9, 40, 8) == [0.5, 1, 2, 5, 10, 20, 50]
    assert log_ticks(3, 3.1, 8) == [2, 5]
    assert log_ticks(0.01, 1e5, 8) == [10.0**k for k in range(-2, 6)]
