"""`fedge-edge verify`: check a bundle, and show what it says of itself."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from fedge.edge.arguments import add_bundle, open_trusted
from fedge.shared.command import Command

if TYPE_CHECKING:
    from fedge.shared.bundle import Bundle

_SHOWN = 8
_STATISTICS = {
    False: [],
    True: [("statistics", "each site's own: pass --statistics to predict and bench")],
}


def _arguments(parser: ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def _run(arguments: Namespace) -> int:
    bundle = open_trusted(arguments)
    if arguments.json:
        text = json.dumps(report(bundle), allow_nan=False) + "\n"
    else:
        text = summary(bundle, arguments.bundle.name)
    sys.stdout.write(text)
    return 0


def report(bundle: Bundle) -> dict[str, Any]:
    """All that a verified bundle says of itself, as JSON values."""
    return {
        "verified": True,
        "key_id": bundle.key_id,
        "site_statistics": bundle.manifest.site_statistics,
        "parts": [dict(vars(part)) for part in bundle.parts],
        "manifest": bundle.manifest.to_json(),
        "statement": bundle.statement,
    }


def summary(bundle: Bundle, name: str) -> str:
    """The same for people, a line a topic."""
    m = bundle.manifest
    sites = ", ".join(m.sites[:_SHOWN]) + (", …" if len(m.sites) > _SHOWN else "")
    labels = ", ".join(m.output.labels[:_SHOWN]) + (", …" if len(m.output.labels) > _SHOWN else "")
    lines = [
        ("verified", f"{name}: signature and every hash"),
        ("key", bundle.key_id),
        ("task", m.task),
        ("run", f"{m.run}, {m.strategy}, {m.rounds} rounds, finished {m.created}"),
        ("sites", f"{len(m.sites)}: {sites}"),
    ]
    for metric in sorted({metric for values in m.metrics.values() for metric in values}):
        found = [
            f"{values[metric]:.4g} {kind.replace('_', ' ')}"
            for kind, values in sorted(m.metrics.items())
            if metric in values
        ]
        lines.append((metric, ", ".join(found)))
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
    ]
    if m.latency:
        where = f"batch {m.latency.batch}, threads {m.latency.threads}, {m.latency.device}"
        lines.append(
            ("latency", f"p50 {m.latency.p50_ms:.3g} ms, p99 {m.latency.p99_ms:.3g} ms ({where})")
        )
    lines += [(part.name, f"{part.bytes:,} bytes, sha256 {part.sha256}") for part in bundle.parts]
    width = max(len(key) for key, _ in lines)
    return "".join(f"{key:{width}}  {value}\n" for key, value in lines)


COMMAND = Command(
    summary="check a bundle's signature and every hash, and show what it holds",
    extra="edge",
    arguments=_arguments,
    run=_run,
    epilog="example:\n  fedge-edge verify model.fedge --trust release.key.pub",
)
