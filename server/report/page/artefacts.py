"""The report's section on compiled artefacts: kept, unproven, and left out with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from fedge.server.report import format as fmt
from fedge.server.report.charts import Bubble, bar, bubble_chart, responsive
from fedge.server.report.format import LONG_NAME, MISSING, THIN, esc, metric_name, metric_value
from fedge.server.report.json_values import mapping, number, sequence, text
from fedge.server.report.records import Run

#: Artefacts that are listed.
MAX_ARTEFACTS: Final = 100
_SOURCE: Final = "onnx-fp32"
#: Graphs that no device takes on its CPU.
_FOR_GPUS: Final = ("onnx-fp16", "onnx-int8-symmetric")


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
            " The metric is what the sites counted on their own held-out examples, which the choice has then seen."
            if metric
            else ""
        )
    )
    lead = (
        "One trained model, made for its targets. What could be executed where it was compiled was compared with the "
        "fp32 graph and timed; the rest is unproven, and the device proves it before use."
    )
    body = fmt.card("Artefacts", grid + facts, notes) + _picture(kept, dropped)
    return fmt.section("compiled", "Compiled for its targets", lead, body)


def _picture(kept: Sequence[Mapping[str, Any]], dropped: Sequence[Mapping[str, Any]]) -> str:
    """Speed against what is lost of the metric; empty where fewer than two artefacts have both."""
    everything = [*((a, "kept") for a in kept), *((d, "left") for d in dropped)]
    sizes = [number(a.get("bytes")) or 0.0 for a, _ in everything if _p50(a) is not None]
    bubbles, largest = [], max(sizes, default=0.0)
    for artefact, css in everything:
        p50, lost = (
            _p50(artefact),
            _lost(_scored(artefact)),
        )
        size = number(artefact.get("bytes"))
        if p50 is None or lost is None or not size:
            continue
        name = text(artefact.get("kind")).removeprefix("onnx-")
        told = f"{text(artefact.get('name'))}: {p50:.3g} ms, {lost:+.2f} lost, {fmt.plain(fmt.size(size), 40)}"
        state = "" if css == "kept" else ", left out"
        bubbles.append(Bubble(p50, lost, size / largest, name + state, told + state, css))
    if len(bubbles) < 2:
        return ""
    metric = next((m for m in (_metric(a) for a, _ in everything) if m), "metric")
    share = all(_is_share(_scored(a)) for a, _ in everything)
    unit = "points" if share else "% of the value"
    names = ("one inference, median, ms", f"{metric_name(metric)} lost, {unit}")
    label = "Speed against the metric lost: " + "; ".join(b.title for b in bubbles)
    draw = partial(bubble_chart, label, names, bubbles)
    drawing = responsive(lambda w, p: draw(width=w, phone=p))
    note = (
        "Left is faster, low is better; an area is a size. What was counted at the sites was counted on the rows by "
        "which the choice was made: they have been seen."
    )
    return fmt.card("Speed against what is lost", drawing, note)


def _lost(score: Mapping[str, Any]) -> float | None:
    """What is lost of the metric: in points of a share, else in % of the fp32 graph's value."""
    value, reference = number(score.get("value")), number(score.get("reference"))
    if value is None or reference is None:
        return None
    lost = reference - value if score.get("higher_is_better", True) else value - reference
    if _is_share(score):
        return 100 * lost
    return 100 * lost / abs(reference) if reference else None


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
    if reference is None or value == reference or not _is_share(score):
        return shown
    return f"{shown} <small>({100 * (value - reference):+.2f})</small>"


def _is_share(score: Mapping[str, Any]) -> bool:
    """Whether the metric lies within 0 and 1, so that a difference is in points; the record says so, not the name."""
    return score.get("share", True) is not False


def _state(artefact: Mapping[str, Any], *, left_out: bool) -> str:
    if left_out and artefact.get("on_device") is True:
        return f"<span class='pill late'>built on the device</span> {esc(text(artefact.get('reason')))}"
    if left_out:
        return f"<span class='pill open'>left out</span> {esc(text(artefact.get('reason')))}"
    if text(artefact.get("kind")) == _SOURCE:
        return "<span class='pill ok'>source</span>"
    qualification = mapping(artefact.get("qualification"))
    if qualification.get("executed") is True:
        gpus = " for GPUs" if text(artefact.get("kind")) in _FOR_GPUS else ""
        return f"<span class='pill ok'>proved here</span>{gpus}"
    return f"<span class='pill late'>unproven</span> {esc(text(qualification.get('reason')))}"


def _p50(artefact: Mapping[str, Any]) -> float | None:
    qualification = mapping(artefact.get("qualification"))
    return number(mapping(qualification.get("latency")).get("p50_ms"))


def _scored(artefact: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(mapping(artefact.get("qualification")).get("score"))


def _metric(artefact: Mapping[str, Any]) -> str:
    return text(_scored(artefact).get("metric"))
