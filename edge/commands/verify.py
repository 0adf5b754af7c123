"""`fedge-edge verify`: checks a bundle and shows its contents."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from fedge.edge.commands.arguments import add_bundle, open_trusted
from fedge.shared.bundle.manifest_artefacts import ONNX_FP32
from fedge.shared.cli.command import Command

if TYPE_CHECKING:
    from fedge.edge.installation.record import DeviceRecord
    from fedge.shared.bundle.bundle import Bundle
    from fedge.shared.bundle.manifest_artefacts import Artefact

_SHOWN = 8
_STATISTICS = {
    False: [],
    True: [("statistics", "each site's own: pass --statistics to predict and bench")],
}


def _arguments(parser: ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def _run(arguments: Namespace) -> int:
    bundle, record = open_trusted(arguments)
    if arguments.json:
        text = json.dumps(report(bundle, record), allow_nan=False) + "\n"
    else:
        text = summary(bundle, arguments.bundle.name, record)
    sys.stdout.write(text)
    return 0


def report(bundle: Bundle, record: DeviceRecord | None = None) -> dict[str, Any]:
    """Contents of a verified bundle and the record of its installation, as JSON values."""
    return {
        "verified": True,
        "key_id": bundle.key_id,
        "site_statistics": bundle.manifest.site_statistics,
        "parts": [dict(vars(part)) for part in bundle.parts],
        "manifest": bundle.manifest.to_json(),
        "statement": bundle.statement,
        **({"installed": record.to_json()} if record else {}),
    }


def summary(bundle: Bundle, name: str, record: DeviceRecord | None = None) -> str:
    """The report as text, one line for each topic."""
    m = bundle.manifest
    sites = ", ".join(m.sites[:_SHOWN]) + (", …" if len(m.sites) > _SHOWN else "")
    labels = ", ".join(m.output.labels[:_SHOWN]) + (", …" if len(m.output.labels) > _SHOWN else "")
    lines = [
        ("verified", f"{name}: signature and every hash"),
        ("key", bundle.key_id),
        ("task", m.task),
        *([("serial", str(m.serial))] if m.serial else []),
        *(
            [
                ("run", f"{m.run}, {m.strategy}, {m.rounds} rounds, finished {m.created}"),
                ("sites", f"{len(m.sites)}: {sites}"),
            ]
            if m.sites
            else [("run", f"none: a network that was bundled by itself, {m.created}")]
        ),
    ]
    for metric in sorted({metric for values in m.metrics.values() for metric in values}):
        figures = [
            f"{values[metric]:.4g} {kind.replace('_', ' ')}"
            for kind, values in sorted(m.metrics.items())
            if metric in values
        ]
        lines.append((metric, ", ".join(figures)))
    batches = ", ".join(map(str, m.parity.batch_sizes))
    lines += [
        ("input", f"{' x '.join(map(str, m.input.shape))} {m.input.dtype}"),
        *_STATISTICS[m.site_statistics],
        ("output", f"{m.output.activation}, {len(m.output.labels)} labels: {labels}"),
        (
            "parity",
            f"within {m.parity.max_abs_difference:.2g} of the trained model"
            f" (allowed {m.parity.tolerance:.2g}; batches of {batches})",
        ),
        ("privacy", m.privacy.words() if m.privacy else "none"),
        *(
            [("made with", ", ".join(f"{name} {of}" for name, of in m.builders.items()))]
            if m.builders
            else []
        ),
    ]
    if m.latency:
        where = f"batch {m.latency.batch}, threads {m.latency.threads}, {m.latency.device}"
        lines.append(
            ("latency", f"p50 {m.latency.p50_ms:.3g} ms, p99 {m.latency.p99_ms:.3g} ms ({where})")
        )
    lines += [(part.name, f"{part.bytes:,} bytes, sha256 {part.sha256}") for part in bundle.parts]
    lines += [("artefact", artefact_line(artefact)) for artefact in m.artefacts]
    if record:
        lines += installed_lines(record)
    width = max(len(key) for key, _ in lines)
    return "".join(f"{key:{width}}  {value}\n" for key, value in lines)


def artefact_line(artefact: Artefact) -> str:
    """The manifest's entry of an artefact as one line of text."""
    parts = [f"{artefact.name}: {artefact.kind}", f"{artefact.bytes:,} bytes"]
    if artefact.engine:
        built = " ".join(f"sm{c}" for c in artefact.engine.capabilities)
        parts.append(f"for {built} by {artefact.engine.runtime} {artefact.engine.version}")
    qualification = artefact.qualification
    if qualification is None:
        source = artefact.kind == ONNX_FP32
        parts.append("the graph that others are compared with" if source else "not executed")
    elif not qualification.executed:
        parts.append(f"not executed ({qualification.reason})")
    else:
        parts.append(
            f"executed, within {qualification.max_abs_difference:.2g} (allowed {qualification.tolerance:.2g})"
        )
    if qualification and qualification.agreement is not None:
        parts.append(f"{100 * qualification.agreement:.4g} % the same labels")
    if qualification and qualification.score:
        score = qualification.score
        parts.append(f"{score.metric} {score.value:.4g} at the sites (fp32 {score.reference:.4g})")
    if qualification and qualification.latency:
        parts.append(
            f"p50 {qualification.latency.p50_ms:.3g} ms, p99 {qualification.latency.p99_ms:.3g} ms"
        )
    return ", ".join(parts)


def installed_lines(record: DeviceRecord) -> list[tuple[str, str]]:
    """Results of an installation, one line for each artefact in order of preference."""
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    where = ", ".join(part for part in (record.cpu, record.gpu, versions) if part)
    lines = [("installed", where)]
    for entry in record.entries:
        p50 = "" if entry.p50_ms is None else f", p50 {entry.p50_ms:.3g} ms"
        lines.append(("runs", f"{entry.candidate.name}{p50}, {entry.reason}"))
    return lines


COMMAND = Command(
    summary="check a bundle's signature and every hash, and show what it holds",
    extra="edge",
    arguments=_arguments,
    run=_run,
    epilog="example:\n  fedge-edge verify model.fedge --trust release.key.pub",
)
