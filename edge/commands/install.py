"""`fedge-edge install`: qualify a bundle's artefacts on this device, build its engines, and note what serves best."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedge.edge.commands.arguments import (
    add_bundle,
    add_statistics,
    add_threads,
    require_expected,
    whole,
)
from fedge.shared.cli.command import Command

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from fedge.edge.backends.device import Device
    from fedge.edge.installation.qualification import Subject, Terms
    from fedge.edge.installation.record import DeviceRecord, Entry
    from fedge.shared.bundle.bundle import Bundle

_RUNS: Final = 500


def _arguments(parser: ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument(
        "--into",
        type=Path,
        required=True,
        metavar="DIR",
        help="new or empty, or an earlier installation, which serves until the new one is complete",
    )
    parser.add_argument(
        "--seconds",
        type=whole(1, 600),
        default=5,
        metavar="S",
        help="time each artefact for so long at most (default 5)",
    )
    add_statistics(parser)
    add_threads(parser)
    parser.add_argument(
        "--allow-older",
        action="store_true",
        help="also in place of a bundle with a higher serial (unsafe)",
    )
    parser.add_argument("--json", action="store_true", help="print the record as JSON")


def _run(arguments: Namespace) -> int:
    from fedge.edge.installation.folder import source
    from fedge.shared.crypto.dsse import load_public

    key = load_public(arguments.trust)
    record = install(
        source(arguments.bundle),
        key,
        arguments.into,
        terms=lambda bundle: _terms(bundle, arguments),
        progress=_progress,
        allow_older=arguments.allow_older,
    )
    if arguments.json:
        sys.stdout.write(json.dumps(record.to_json(), allow_nan=False) + "\n")
    else:
        sys.stdout.write(table(record.entries) + f"installed in {arguments.into}\n")
    return 0


def install(
    source: Path,
    key: Ed25519PublicKey,
    directory: Path,
    terms: Callable[[Bundle], Terms],
    progress: Callable[[str], None],
    *,
    allow_older: bool = False,
) -> DeviceRecord:
    """Install a bundle; where anything fails, the folder holds what it held before.

    Args:
        source: the bundle's file.
        key: public key that must have signed it.
        directory: of the installation; created if missing.
        terms: gives the inputs and limits of the trials for the verified bundle.
        progress: called with a line of text for each step.
        allow_older: replace a bundle of this task by one with a lower serial. Unsafe: an old one stays signed.

    Raises:
        BundleError: 701 to 706, 713, the bundle is refused; 710, its fp32 graph does not run here.
        ConfigError: 206, the folder holds something other than an installation.
        UsageError: 107, it cannot be written, or another installation is under way.
    """
    from fedge.edge.backends.device import detect, runtime_versions
    from fedge.edge.installation import writer
    from fedge.edge.installation.engines import build_all
    from fedge.edge.installation.qualification import qualify
    from fedge.edge.installation.record import BUNDLE, DeviceRecord
    from fedge.shared.bundle.bundle import open_bundle

    with writer.locked(directory), writer.slot(directory) as folder:
        digest = writer.copy_bundle(source, folder)
        bundle = open_bundle(folder / BUNDLE, key)
        if not allow_older:
            _require_newer(bundle, directory, key)
        trial_terms = terms(bundle)
        device = detect(bundle.manifest.artefacts, engines=True)
        graph, *others = _subjects(bundle, device)
        built = list(build_all(bundle, device, directory, progress))
        entries = qualify(graph, [*built, *others], trial_terms, progress)
        record = DeviceRecord(
            folder=writer.final(folder),
            bundle_sha256=digest,
            manifest_sha256=bundle.parts[1].sha256,
            cpu=device.cpu,
            gpu=device.gpu.name if device.gpu else "",
            versions={**runtime_versions(), **device.wheels},
            threads=trial_terms.threads,
            entries=entries,
        )
        writer.commit(directory, folder, record, built)
    return record


def _require_newer(bundle: Bundle, directory: Path, key: Ed25519PublicKey) -> None:
    """Refuse a bundle that is older than the one of its task and key that is installed."""
    from fedge.edge.installation.folder import open_installed
    from fedge.shared.errors import BundleError, FedgeError

    try:
        installed = open_installed(directory, key)[0].manifest
    except (FedgeError, OSError):
        return  # there is none, or none that this key has signed
    if installed.task == bundle.manifest.task and bundle.manifest.serial < installed.serial:
        raise BundleError(
            713,
            f"serial: must be {installed.serial} or more, got {bundle.manifest.serial}",
            remedy="Give a newer bundle, or install it with --allow-older.",
        )


def _subjects(bundle: Bundle, device: Device) -> list[Subject]:
    """Every candidate of the bundle's artefacts; the fp32 graph on the CPU first."""
    from fedge.edge.backends.backend import CPU
    from fedge.edge.backends.candidates import Candidate, candidates
    from fedge.edge.installation.qualification import Subject

    artefacts = bundle.manifest.artefacts
    listed = candidates(artefacts, device, allow_unqualified=True)
    subjects = [Subject(c, bundle.artefacts[c.artefact.name]) for c in listed]
    names = {c.artefact.name for c in listed}
    for artefact in artefacts:
        if artefact.name not in names:
            reason = "is what engines are built of"
            subjects.append(Subject(Candidate(artefact, CPU, reason)))
    return sorted(subjects, key=lambda s: not s.candidate.last_resort)


def _terms(bundle: Bundle, arguments: Namespace) -> Terms:
    require_expected(bundle, arguments)
    from fedge.edge.backends.trial import Timing
    from fedge.edge.inputs.reader import read_statistics
    from fedge.edge.installation.qualification import Terms
    from fedge.edge.outputs import parity
    from fedge.edge.runtime.model import shapes, with_statistics
    from fedge.shared.bundle import generated_examples

    manifest = bundle.manifest
    if arguments.statistics:
        steps = with_statistics(manifest, read_statistics(arguments.statistics))
    else:
        steps = generated_examples.stand_in(manifest.input, manifest.preprocessing)
    return Terms(
        parity.examples(manifest, steps, parity.BATCH_SIZES),
        shapes(manifest),
        manifest.output,
        arguments.threads,
        Timing(_RUNS, arguments.seconds),
    )


def _progress(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def table(entries: tuple[Entry, ...]) -> str:
    """The results as text, one line for each artefact and place."""
    head = ("artefact", "bytes", "p50 ms", "p99 ms", "MB", "off by", "same labels", "")
    rows = [head, *(_row(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip() + "\n")
    return "".join(lines)


def _row(entry: Entry) -> tuple[str, ...]:
    def figure(value: float | None, form: str, unit: float = 1.0) -> str:
        return "-" if value is None else format(value * unit, form)

    return (
        entry.candidate.name,
        f"{entry.artefact.bytes:,}" if entry.artefact.bytes else "-",
        figure(entry.p50_ms, ".3f"),
        figure(entry.p99_ms, ".3f"),
        figure(entry.peak_rss_mb, ".0f"),
        figure(entry.max_abs_difference, ".2g"),
        figure(entry.agreement, ".4g", 100) + (" %" if entry.agreement is not None else ""),
        entry.reason,
    )


COMMAND = Command(
    summary="qualify a bundle's artefacts on this device and build its engines",
    extra="edge",
    arguments=_arguments,
    run=_run,
    epilog=(
        "verify, predict, bench and serve take DIR in place of the bundle\n\n"
        "example:\n  fedge-edge install model.fedge --trust release.key.pub --into installed"
    ),
)
