"""The report's section on the device, and the latency of a prediction there and at release."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from fedge.server.report import format as fmt
from fedge.server.report.format import MISSING, THIN, esc, metric_name, metric_value, tile
from fedge.server.report.json_values import mapping, number, numbers, text, whole
from fedge.server.report.records import Run


def _milliseconds(value: float | None) -> str:
    return fmt.duration(None if value is None else value / 1000)


def _megabytes(value: float | None) -> str:
    return MISSING if value is None else f"{fmt.significant(value)}{THIN}MB"


def _count(value: float | None) -> str:
    return MISSING if value is None else fmt.count(value)


#: Members of a latency record: their words and how they are written.
_MEASURES: Final[dict[str, tuple[str, Callable[[float | None], str]]]] = {
    "p50_ms": ("median (p50)", _milliseconds),
    "p99_ms": ("99th percentile (p99)", _milliseconds),
    "predict_p50_ms": ("with preprocessing, median", _milliseconds),
    "predict_p99_ms": ("with preprocessing, p99", _milliseconds),
    "items_per_second": ("items a second", _count),
    "verify_ms": ("to verify the bundle", _milliseconds),
    "load_ms": ("to load the model", _milliseconds),
    "peak_rss_mb": ("peak memory", _megabytes),
    "batch": ("batch size", _count),
    "threads": ("threads", _count),
    "runs": ("runs timed", _count),
}


def latency_card(run: Run, manifest: Mapping[str, Any]) -> str:
    """Measures by row, places by column, so that it fits a phone; empty where nothing was timed."""
    released, bench = mapping(manifest.get("latency")), mapping(run.edge.get("bench"))
    places = [
        (w, record) for w, record in (("at release", released), ("on the device", bench)) if record
    ]
    rows = [
        [esc(words), *(esc(show(number(record.get(key)))) for _, record in places)]
        for key, (words, show) in _MEASURES.items()
        if any(number(record.get(key)) is not None for _, record in places)
    ]
    if not rows:
        return ""
    grid = fmt.table(
        "Latency", [("", ""), *((where, "n") for where, _ in places)], rows, css="measures"
    )
    sources = [(w, text(record.get("device"))) for w, record in places]
    devices = ", ".join(f"{w} on {where}" for w, where in sources if where)
    note = f"Time of one prediction; {esc(devices)}." if devices else "Time of one prediction."
    return fmt.card("Latency", grid, note)


def _tiles(edge: Mapping[str, Any]) -> list[str]:
    """Key figures of what the device did; those that edge.json does not hold are left out."""
    verified, rows = edge.get("verified"), whole(edge.get("rows"))
    tiles = []
    if isinstance(verified, bool):
        words = "signature and every hash" if verified else "the bundle was refused"
        value = "✓ verified" if verified else "✕ refused"
        tiles.append(tile("Verification", value, words, "good" if verified else "bad"))
    if rows is not None:
        seconds = number(edge.get("seconds"))
        words = "rows" if seconds is None else f"rows, {fmt.duration(seconds)} in all"
        tiles.append(tile("Predicted", fmt.count(rows), words))
    for name, measured in list(numbers(edge.get("metrics")).items())[:3]:
        label = metric_name(name)
        label = label[:1].upper() + label[1:]
        tiles.append(tile(label, metric_value(name, measured), "on these rows"))
    agreement = number(edge.get("agreement"))
    if agreement is not None:
        tiles.append(tile("Agreement", fmt.share(agreement), "same label as the trained model"))
    environment = mapping(edge.get("environment"))
    packages = whole(environment.get("packages"))
    if packages is not None:
        tiles.append(tile("Packages", fmt.count(packages), _contents(environment)))
    return tiles


def _contents(environment: Mapping[str, Any]) -> str:
    """The packages that the environment has and lacks, of those that were checked (text)."""
    lacks = [name for name, held in environment.items() if held is False]
    holds = [name for name, held in environment.items() if held is True]
    parts = [f"with {' and '.join(holds)}"] if holds else []
    parts += [f"without {' and '.join(lacks)}"] if lacks else []
    return ", ".join(parts)


def device(run: Run) -> str:
    """The section on the device's run of the bundle; empty before it."""
    edge = run.edge
    if not edge:
        return ""
    environment, bench = mapping(edge.get("environment")), mapping(edge.get("bench"))
    shown = {"verified", "rows", "metrics", "agreement", "seconds", "environment", "bench"}
    others = {k: v for k, v in edge.items() if k not in shown}
    others |= {k: v for k, v in environment.items() if k != "packages" and not isinstance(v, bool)}
    others |= {k: v for k, v in bench.items() if k not in _MEASURES and k != "device"}
    facts = [(k.replace("_", " "), esc(fmt.value_text(v))) for k, v in others.items()]
    body = f'<div class="tiles">{"".join(_tiles(edge))}</div>'
    if not run.release:
        body += latency_card(run, {})
    if facts:
        body += fmt.card("More", fmt.definitions(facts))
    lead = "The edge runtime opened the bundle and predicted."
    if edge.get("verified") is False:
        lead = "The edge runtime refused the bundle."
    return fmt.section("device", "On the device", lead, body)
