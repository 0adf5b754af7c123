"""How values are written."""

from __future__ import annotations

import pytest

from fedge.server.report import format as fmt


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (168_312, "168 kB"),
        (999_600, "1.00 MB"),
        (4.08e9, "4.08 GB"),
    ],
)
def test_size(octets: float, expected: str) -> None:
    assert fmt.size(octets).replace(fmt.THIN, " ") == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"),
        (7.13e-5, "71.3 µs"),
        (0.42, "420 ms"),
        (0.9999, "1.00 s"),
        (84, "84.0 s"),
        (845, "14.1 min"),
        (7380, "2.05 h"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert fmt.duration(seconds).replace(fmt.THIN, " ") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1.43e-6, "1.43 × 10⁻⁶"),
        (1e-4, "1 × 10⁻⁴"),
        (0.0625, "0.0625"),
        (999.7, "1000"),
        (12345, "12 345"),
    ],
)
def test_significant(value: float, expected: str) -> None:
    assert fmt.significant(value).replace(fmt.THIN, " ") == expected


def test_what_is_missing_is_a_dash() -> None:
    assert {
        fmt.size(None),
        fmt.duration(None),
        fmt.metric_value("auc", None),
        fmt.value_text(None),
    } == {"–"}
    assert fmt.value_text(float("nan")) == fmt.value_text(float("-inf")) == "–"


def test_metric_units() -> None:
    assert fmt.metric_value("accuracy", 0.9649).replace(fmt.THIN, " ") == "96.5 %"
    assert fmt.metric_value("auc", 0.9649) == "0.965"


def test_share_reads_100_only_where_it_is_one() -> None:
    assert fmt.share(1.0).startswith("100")
    assert fmt.share(0.999999).startswith("99.99")


def test_natural_order() -> None:
    names = ["site-10", "site-2", "b", "site-1", "²-x", "9"]
    assert sorted(names, key=fmt.natural)[:1] == ["9"]
    assert [n for n in sorted(names, key=fmt.natural) if n.startswith("site")] == [
        "site-1",
        "site-2",
        "site-10",
    ]


def test_text_is_escaped_bounded_and_free_of_controls() -> None:
    assert fmt.esc("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert fmt.esc("a\u202eb\x00c\nd") == "a\ufffdb\ufffdc\ufffdd"
    assert len(fmt.esc("x" * 10_000)) == fmt.MAX_TEXT


def test_unknown_values_stay_on_one_line() -> None:
    assert fmt.value_text({"a": [1, True], "b": None}) == "a: 1, yes, b: –"
    assert fmt.value_text(list(range(1000))) == "1000 values"
    assert len(fmt.value_text({"a": {"b": {"c": {"d": 1}}}})) < 40
