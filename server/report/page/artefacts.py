"""The report's section on compiled artefacts: kept, unproven, and left out with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fedge.server.report import format as fmt
from fedge.server.report.charts import bar
from fedge.server.report.format import LONG_NAME, MISSING, THIN, esc, metric_name, metric_value
from fedge.server.report.json_values import mapping, number, sequence, text
from fedge.server.report.records import Run

#: Artefacts that are listed.
MAX_ARTEFACTS: Final = 100
_SOURCE: Final = "onnx-fp32"


def compiled(run: Run) -> str:
    """The section; empty before ``fedge compile``."""
    kept = [mapping(a) for a in sequence(run.compiled.get("kept"))[:MAX_ARTEFACTS]]
    dropped = [mapping(d) for d in sequence(run.compiled.get("dropped"))[:MAX_ARTEFACTS]]
    if not kept:
        return ""
    if run.model_sha256 and text(run.compiled.get("model_sha256")) != run.model_sha256:
        return ""
    everything = [*kept, *dropped]
    slowest = max((_p50(a) or 0.0 for a in everything), default=0.0)
    rows = [
        [*_cells(a, slowest), _state(a, left_out=index >= len(kept))]
        for index, a in enumerate(everything)
    ]
    metric = next((m for m in map(_metric, everything) if m), "")
    scored, timed = metric_name(metric) if metric else "metric", "one inference, median"
    head = [
        ("artefact", ""),
        ("size", "n"),
        (timed, "wide-bar"),
        ("", "n time"),
        ("memory", "n"),
        ("agreement", "n"),
        (scored, "n"),
        ("", "words"),
    ]
    labels = ("", "size", "", timed, "memory", "agreement", scored, "")
    grid = fmt.table("Compiled artefacts", head, rows, labels=labels)
    facts = fmt.definitions(
        [
            ("compiled for", esc(", ".join(str(t) for t in sequence(run.compiled.get("targets"))))),
            ("timed on", esc(text(run.compiled.get("device")))),
        ]
    )
    notes = (
        "Agreement: the share of generated inputs to which the artefact gives the fp32 graph's label."
        + (
            " The metric is what the sites counted on their own held-out examples."
            if metric
            else ""
        )
    )
    lead = (
        "One trained model, made for its targets. What could be executed where it was compiled was compared with the "
        "fp32 graph and timed; the rest is unproven, and the device proves it before use."
    )
    return fmt.section(
        "compiled", "Compiled for its targets", lead, fmt.card("Artefacts", grid + facts, notes)
    )


def _cells(artefact: Mapping[str, Any], slowest: float) -> list[str]:
    qualification = mapping(artefact.get("qualification"))
    p50, name = _p50(artefact), text(artefact.get("name"))
    shown = fmt.duration(None if p50 is None else p50 / 1000)
    time_bar = bar(f"{name}: {shown}", p50 / slowest) if p50 is not None and slowest else ""
    memory, agreement = (
        number(qualification.get("peak_rss_mb")),
        number(qualification.get("agreement")),
    )
    size = number(artefact.get("bytes"))
    return [
        esc(name) if len(name) <= LONG_NAME else f'<span class="file">{esc(name)}</span>',
        fmt.size(size) if size else MISSING,
        time_bar,
        shown,
        MISSING if memory is None else f"{fmt.significant(memory)}{THIN}MB",
        MISSING if agreement is None else fmt.share(agreement),
        _score(mapping(qualification.get("score"))),
    ]


def _score(score: Mapping[str, Any]) -> str:
    """The metric, and how far it is from the fp32 graph's, in points where it is a share."""
    metric, value = text(score.get("metric")), number(score.get("value"))
    reference = number(score.get("reference"))
    if value is None:
        return MISSING
    shown = esc(metric_value(metric, value))
    if reference is None or value == reference or not fmt.is_share(metric):
        return shown
    return f"{shown} <small>({100 * (value - reference):+.2f})</small>"


def _state(artefact: Mapping[str, Any], *, left_out: bool) -> str:
    if left_out:
        return f"<span class='pill open'>left out</span> {esc(text(artefact.get('reason')))}"
    if text(artefact.get("kind")) == _SOURCE:
        return "<span class='pill ok'>source</span>"
    qualification = mapping(artefact.get("qualification"))
    if qualification.get("executed") is True:
        return "<span class='pill ok'>proved here</span>"
    return f"<span class='pill late'>unproven</span> {esc(text(qualification.get('reason')))}"


def _p50(artefact: Mapping[str, Any]) -> float | None:
    qualification = mapping(artefact.get("qualification"))
    return number(mapping(qualification.get("latency")).get("p50_ms"))


def _metric(artefact: Mapping[str, Any]) -> str:
    qualification = mapping(artefact.get("qualification"))
    return text(mapping(qualification.get("score")).get("metric"))
