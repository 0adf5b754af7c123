"""The charts' arithmetic, and that what is drawn lies where it should."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.server.report.axes import LABEL_PITCH, nice_ticks, round_ticks, spread, thin, tick_texts
from fedge.server.report.charts import (
    Band,
    Bubble,
    Column,
    Line,
    bar,
    bubble_chart,
    column_chart,
    line_chart,
    sparkline,
)
from fedge.server.report.page.sites import histogram

finite = st.floats(-1e6, 1e6)


@given(finite, finite)
def test_nice_ticks_enclose_the_values(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert 2 <= len(ticks) <= 9
    assert len(set(tick_texts(ticks))) == len(ticks)


def test_nice_ticks_are_round() -> None:
    assert nice_ticks(0, 97) == [0, 20, 40, 60, 80, 100]
    assert tick_texts(nice_ticks(0.82, 1.0)) == ["0.80", "0.85", "0.90", "0.95", "1.00"]
    assert nice_ticks(3, 3)[0] < 3 < nice_ticks(3, 3)[-1]
    assert tick_texts([-0.0, 0.5]) == ["0.0", "0.5"]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(1, 1, [1]), (1, 12, [2, 4, 6, 8, 10, 12]), (1, 60, [1, 10, 20, 30, 40, 50, 60])],
)
def test_round_ticks(first: int, last: int, expected: list[int]) -> None:
    assert round_ticks(first, last, 8) == expected


@given(st.lists(st.floats(0, 200), max_size=8))
def test_spread_keeps_labels_apart_and_in_order(ends: list[float]) -> None:
    placed = spread(ends, 0, 200)
    order = sorted(range(len(ends)), key=lambda i: ends[i])
    gaps = [placed[b] - placed[a] for a, b in itertools.pairwise(order)]
    assert all(gap >= LABEL_PITCH - 1e-6 for gap in gaps)
    assert all(-1e-6 <= p <= 200 + 1e-6 for p in placed)


def test_thin_keeps_both_ends() -> None:
    points = [(float(i), 0.0) for i in range(1001)]
    kept = thin(points, 100)
    assert len(kept) == 100
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert thin(points[:5], 100) == points[:5]


def coordinates(svg: str) -> list[tuple[float, float]]:
    found = re.findall(r'cx="([-0-9.]+)" cy="([-0-9.]+)"', svg)
    return [(float(x), float(y)) for x, y in found]


def test_line_chart_lies_within_its_picture() -> None:
    lines = [Line("a", [(1, 10), (2, 90), (3, 95)], "mean", "site mean 95.0 %", "mean")]
    svg = line_chart(
        "said", ("round", "Accuracy (%)"), lines, width=540, height=260, limits=(0, 100)
    )
    points = coordinates(svg)
    assert len(points) == 3
    assert all(0 <= x <= 540 and 0 <= y <= 260 for x, y in points)
    assert points[0][1] > points[1][1] > points[2][1]  # higher values lie higher
    assert points[0][0] < points[1][0] < points[2][0]
    assert "site mean 95.0 %" in svg
    assert 'aria-label="said"' in svg
    ticks = [float(t) for t in re.findall(r'text-anchor="end">([-0-9.]+)<', svg)]
    assert max(ticks) == 100


def test_line_chart_on_a_phone_uses_the_short_label() -> None:
    lines = [Line("a", [(1, 1), (2, 2)], "mean", "site mean 95.0 %", "mean")]
    svg = line_chart("said", ("round", "y"), lines, width=330, phone=True)
    assert ">mean<" in svg
    assert "95.0 %" not in svg


def test_line_chart_escapes_names() -> None:
    lines = [Line("<b>", [(1, 1)], "site", "<i>")]
    svg = line_chart("<u>", ("<x>", "<y>"), lines, [Band("<s>", [(1, 0, 2)])], width=330)
    assert not re.search(r"<[biuxys]>", svg)


def test_nothing_to_draw() -> None:
    assert line_chart("said", ("x", "y"), [Line("a", [], "mean")], width=330) == ""
    assert column_chart("said", ("x", "y"), [], ("sent",), width=330) == ""
    assert sparkline("said", [], 0, 1) == ""
    assert bubble_chart("said", ("x", "y"), [], width=330) == ""


def test_columns_stack_from_the_axis() -> None:
    svg = column_chart(
        "said", ("x", "y"), [Column(1, (3.0, 1.0), "t")], ("sent", "received"), width=330
    )
    boxes = re.findall(
        r'<rect class="(\w+)" x="[^"]+" y="([0-9.]+)" width="[^"]+" height="([0-9.]+)"', svg
    )
    (_, sent_top, sent_height), (_, received_top, received_height) = boxes
    assert float(sent_height) == pytest.approx(3 * float(received_height), abs=0.3)
    assert float(received_top) + float(received_height) == pytest.approx(float(sent_top), abs=0.2)


def test_bar_is_clipped_to_its_cell() -> None:
    assert 'width="100.00"' in bar("said", 1.7)
    assert 'width="0.00"' in bar("said", -1)
    assert 'class="mark"' in bar("said", 0.5, 0.9)
    assert 'class="mark"' not in bar("said", 0.5)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_histogram_counts_every_value(values: list[float]) -> None:
    bins = histogram(values)
    assert sum(n for _, _, n in bins) == len(values)


def bubbles(svg: str) -> list[tuple[float, float, float]]:
    found = re.findall(r'<circle class="bubble [^"]*" cx="([^"]+)" cy="([^"]+)" r="([^"]+)"', svg)
    return [(float(x), float(y), float(r)) for x, y, r in found]


def test_a_bubbles_area_is_its_share_and_its_place_is_its_value() -> None:
    found = bubbles(
        bubble_chart(
            "said",
            ("ms", "lost"),
            [Bubble(1, 0, 1, "fp32", "t", "kept"), Bubble(2, 4, 0.25, "int8", "t", "left")],
            width=540,
        )
    )
    (x, y, r), (far, lost, small) = found
    assert small == pytest.approx(r / 2, abs=0.1), "a quarter of the area is half of the radius"
    assert far > x
    assert lost < y, "more lost lies higher"


places = st.builds(
    lambda x, y, share, label: Bubble(x, y, share, label, "<t>", "kept"),
    st.floats(0.001, 1e4), st.floats(-5, 60), st.floats(0, 1), st.sampled_from(["fp32", "int8, left out", "<b>"]),
)  # fmt: skip


@given(st.lists(places, min_size=1, max_size=8), st.sampled_from([(330.0, True), (900.0, False)]))
def test_bubbles_and_their_labels_keep_to_their_picture(
    drawn: list[Bubble], size: tuple[float, bool]
) -> None:
    width, phone = size
    svg = bubble_chart("said", ("<x>", "<y>"), drawn, width=width, height=260, phone=phone)
    assert not re.search(r"<[bxyt]>", svg)
    assert all(r <= x + r and x <= width and y - r >= 0 and y <= 260 for x, y, r in bubbles(svg))
    labels = re.findall(r'class="label" x="([^"]+)" y="([^"]+)" text-anchor="middle">([^<]*)<', svg)
    assert len(labels) == len(drawn)
    ends = [(float(x), float(y)) for x, y, _ in labels]
    assert len(set(ends)) == len(ends), "no label lies on another"
    assert all(0 <= y <= 260 for _, y in ends)
