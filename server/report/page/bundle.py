"""The report's section on the bundle: its hash and signature, parity, latency, manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from fedge.server.report import format as fmt
from fedge.server.report import noised_figures as noise_figures
from fedge.server.report.format import MISSING, esc, metric_name
from fedge.server.report.json_values import mapping, number, numbers, sequence, text
from fedge.server.report.page.device import latency_card
from fedge.server.report.records import Run

#: Parts of the manifest that have a place of their own; every other one is listed as it is.
_SHOWN: Final = frozenset(
    ("artefacts", "input", "output", "preprocessing", "parity", "latency", "sites", "metrics")
)
#: Features of the input schema that are listed.
MAX_FEATURES: Final = 200
#: Artefacts that are listed.
MAX_ARTEFACTS: Final = 100


def hash_html(value: str) -> str:
    """A hash in monospace that may break across lines; empty where there is none."""
    return f"<code class='hash'>{esc(value)}</code>" if value else ""


def parity(manifest: Mapping[str, Any]) -> tuple[float, float] | None:
    """(largest difference, tolerance), or None where the manifest does not hold both."""
    record = mapping(manifest.get("parity"))
    difference, tolerance = (
        number(record.get("max_abs_difference")),
        number(record.get("tolerance")),
    )
    return None if difference is None or tolerance is None else (difference, tolerance)


def _parity_scale(difference: float, tolerance: float) -> str:
    """Largest difference and tolerance as a picture on a logarithmic scale."""
    low = math.floor(math.log10(max(min(difference, tolerance), 1e-12))) - 1
    high = math.ceil(math.log10(max(difference, tolerance, 1e-11))) + 1

    def at(value: float) -> float:
        return 8 + (math.log10(max(value, 10.0**low)) - low) / (high - low) * 304

    actual, allowed = at(difference), at(tolerance)
    css = "good" if difference <= tolerance else "bad"
    anchor = "start" if actual < 160 else "end"
    other = "end" if allowed > 160 else "start"
    label = (
        f"Largest difference {fmt.significant(difference)}, allowed {fmt.significant(tolerance)}"
    )
    return (
        f'<svg class="chart scale" role="img" aria-label="{esc(label)}" viewBox="0 0 320 62" width="320" height="62">'
        f'<path class="track" d="M8 31H312"/><path class="allowed" d="M8 31H{allowed:.1f}"/>'
        f'<path class="limit" d="M{allowed:.1f} 21v20"/><circle class="{css}" cx="{actual:.1f}" cy="31" r="6"/>'
        f'<text class="label" x="{actual - 6 if anchor == "start" else actual + 6:.1f}" y="15" text-anchor="{anchor}">'
        f"found {esc(fmt.significant(difference))}</text>"
        f'<text class="tick" x="{allowed:.1f}" y="57" text-anchor="{other}">allowed {esc(fmt.significant(tolerance))}'
        "</text></svg>"
    )


def _parity_card(manifest: Mapping[str, Any]) -> str:
    differences = parity(manifest)
    if differences is None:
        return ""
    difference, tolerance = differences
    batches = ", ".join(
        fmt.value_text(b) for b in sequence(mapping(manifest.get("parity")).get("batch_sizes"))
    )
    if difference > tolerance:
        verdict = "The exported model differs from the trained one by <b>more than is allowed</b>."
    elif difference == 0:
        verdict = "The exported model gives <b>exactly</b> the trained model's outputs."
    else:
        verdict = (
            f"The exported model's outputs lie within <b>{fmt.significant(difference)}</b> of the trained model's, "
            f"{fmt.significant(tolerance / difference, 2)} times below the limit."
        )
    words = f"<p>{verdict}</p>" + (
        f"<p class='note'>Compared at batch sizes {esc(batches)}.</p>" if batches else ""
    )
    return fmt.card("Parity with the trained model", words + _parity_scale(difference, tolerance))


def _schema_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    schema, output = mapping(manifest.get("input")), mapping(manifest.get("output"))
    shape = " × ".join(fmt.value_text(n) for n in sequence(schema.get("shape")))
    rows = []
    if schema:
        features = sequence(schema.get("features"))
        named = f", {fmt.plural(len(features), 'named column')}" if features else ""
        rows.append(("input", f"{esc(shape)} {esc(text(schema.get('dtype')))}{named}".strip()))
    if output:
        labels = [fmt.value_text(x) for x in sequence(output.get("labels"))]
        more = f" and {len(labels) - 30} more" if len(labels) > 30 else ""
        rows.append(("labels", esc(", ".join(labels[:30])) + more))
        threshold = number(output.get("threshold"))
        sigmoid = output.get("activation") == "sigmoid" and threshold is not None
        chosen = (
            f", threshold {fmt.significant(threshold)}" if sigmoid and threshold is not None else ""
        )
        rows.append(("output", esc(fmt.value_text(output.get("activation"))) + chosen))
    steps = [_step(mapping(s)) for s in sequence(manifest.get("preprocessing"))]
    if steps:
        rows.append(("preprocessing", esc(" → ".join(steps))))
    return rows


def _step(step: Mapping[str, Any]) -> str:
    """A preprocessing step in a few words."""
    name = text(step.get("op")) or "step"
    if name == "scale":
        return f"scale by {fmt.value_text(step.get('factor'))}"
    if name == "reshape":
        return "reshape to " + " × ".join(fmt.value_text(n) for n in sequence(step.get("shape")))
    if name == "standardise":
        return f"standardise {fmt.plural(len(sequence(step.get('mean'))), 'column')}"
    if name == "one-hot":
        return f"one-hot {fmt.plural(len(sequence(step.get('columns'))), 'column')}"
    return name


def _artefacts(manifest: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """A table of them, and their hashes as facts."""
    artefacts = [mapping(a) for a in sequence(manifest.get("artefacts"))]
    if not artefacts:
        return "", []
    rows = [
        [
            esc(fmt.value_text(a.get("name"))),
            esc(fmt.value_text(a.get("kind"))),
            fmt.size(number(a.get("bytes"))),
            esc(fmt.value_text(a.get("opset"))),
        ]
        for a in artefacts[:MAX_ARTEFACTS]
    ]
    head = [("artefact", ""), ("kind", ""), ("size", "n"), ("opset", "n")]
    grid = fmt.table("Artefacts in the bundle", head, rows)
    hashes = [
        (f"SHA-256 of {fmt.value_text(a.get('name'))}", hash_html(text(a.get("sha256"))))
        for a in artefacts[:MAX_ARTEFACTS]
    ]
    return grid, hashes


def _features(manifest: Mapping[str, Any]) -> str:
    features = [mapping(f) for f in sequence(mapping(manifest.get("input")).get("features"))]
    if not features:
        return ""
    rows = []
    for f in features[:MAX_FEATURES]:
        categories = esc(fmt.value_text(f.get("categories"))) if f.get("categories") else MISSING
        limits = f"{fmt.value_text(f.get('low'))} to {fmt.value_text(f.get('high'))}"
        rows.append(
            [
                esc(fmt.value_text(f.get("name"))),
                esc(fmt.value_text(f.get("unit"))),
                esc(limits),
                categories,
            ]
        )
    head = [("column", ""), ("unit", ""), ("plausible mean", "n"), ("categories", "words")]
    grid = fmt.table("Columns of the input", head, rows, tall=len(rows) > 12)
    cut = (
        f"<p class='note'>The first {MAX_FEATURES} of {len(features)}.</p>"
        if len(features) > MAX_FEATURES
        else ""
    )
    return f"<details><summary>Columns of the input</summary>{cut}{grid}</details>"


def _site_names(manifest: Mapping[str, Any]) -> str:
    names = sorted((fmt.value_text(s) for s in sequence(manifest.get("sites"))), key=fmt.natural)
    if len(names) <= 24:
        return esc(", ".join(names), 2000)
    return f"{len(names)}: {esc(', '.join(names[:12]), 1000)} … {esc(names[-1])}"


def _metric_rows(metrics: Mapping[str, Any], noise: noise_figures.Noise) -> list[tuple[str, str]]:
    """Metrics as they stand in a manifest: by kind (pooled, site mean), or directly by name."""
    kinds = {kind: numbers(values) for kind, values in metrics.items() if isinstance(values, dict)}
    return [
        (f"metrics, {kind.replace('_', ' ')}" if kind else "metrics", _in_line(values, noise, kind))
        for kind, values in ({"": numbers(metrics)} | kinds).items()
        if values
    ]


def _in_line(values: Mapping[str, float], noise: noise_figures.Noise, kind: str) -> str:
    figures = ((m, noise_figures.shown(m, v, noise.stddev(kind, m))) for m, v in values.items())
    return ", ".join(f"{esc(metric_name(m))} {esc(shown)}" for m, shown in figures)


def _manifest_card(manifest: Mapping[str, Any], noise: noise_figures.Noise) -> str:
    artefacts, hashes = _artefacts(manifest)
    rows = [*hashes, ("sites", _site_names(manifest)), *_schema_rows(manifest)]
    rows += _metric_rows(mapping(manifest.get("metrics")), noise)
    for key, value in manifest.items():
        if key not in _SHOWN:
            shown = fmt.value_text(value)
            is_hash = len(shown) == 64 and all(c in "0123456789abcdef" for c in shown)
            rows.append(
                (
                    key.replace("_", " ").replace("sha256", "SHA-256"),
                    hash_html(shown) if is_hash else esc(shown),
                )
            )
    return fmt.card("Manifest", artefacts + fmt.definitions(rows) + _features(manifest))


def release(run: Run) -> str:
    """The section on the bundle; empty before ``fedge release``."""
    if not run.release:
        return ""
    manifest, bundle = mapping(run.release.get("manifest")), mapping(run.release.get("bundle"))
    key = text(run.release.get("key_id"))
    octets = number(bundle.get("bytes"))
    name = text(bundle.get("file")).replace("\\", "/").rsplit("/", 1)[-1]
    identity = fmt.definitions(
        [
            ("file", esc(name)),
            ("size", fmt.size(octets) if octets is not None else ""),
            ("SHA-256", hash_html(text(bundle.get("sha256")))),
            ("signed with key", hash_html(key)),
        ]
    )
    lead = "The only thing that reaches a device: the model, its origin, and a signature over both."
    left = f'<div class="stack">{fmt.card("Bundle", identity)}{_parity_card(manifest)}</div>'
    body = f'<div class="pair">{left}{latency_card(run, manifest)}</div>'
    body += _manifest_card(manifest, noise_figures.last(run)) if manifest else ""
    return fmt.section("release", "The signed bundle", lead, body)
