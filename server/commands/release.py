"""`fedge release`: make the signed bundle of a finished run."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.shared.cli.command import Command

if TYPE_CHECKING:
    from fedge.server.release.pipeline import ReleaseSummary


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="written by `fedge simulate --out`"
    )
    parser.add_argument(
        "--key", type=Path, required=True, metavar="PATH", help="private key that signs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the bundle, for example model.fedge",
    )
    parser.add_argument(
        "--artifacts",
        type=Path,
        metavar="DIR",
        help="output of `fedge compile` for this run, to go into the bundle",
    )
    parser.add_argument(
        "--serial",
        type=_serial,
        metavar="N",
        help="by which devices tell an older bundle (default: seconds from 1970 to the run's end, 1 more each time)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _serial(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 2**63):
        raise ArgumentTypeError(f"must be a whole number from 1 to 2^63 - 1, got {text!r}")
    return int(text)


def _run(arguments: Namespace) -> int:
    from fedge.server.release.pipeline import release

    summary = release(
        arguments.run_dir,
        arguments.key,
        arguments.out,
        artifacts=arguments.artifacts,
        serial=arguments.serial,
    )
    if arguments.json:
        sys.stdout.write(json.dumps(summary.to_json(), allow_nan=False) + "\n")
    else:
        sys.stdout.write(_text(summary, arguments.out))
    return 0


def _text(summary: ReleaseSummary, out: Path) -> str:
    manifest = summary.manifest
    lines = [
        f"released  {out} ({summary.bundle.bytes:,} bytes)",
        f"key       {summary.key_id}",
        f"serial    {manifest.serial}",
        f"parity    within {manifest.parity.max_abs_difference:.2g} of the trained model",
    ]
    for artefact in manifest.artefacts[1:]:
        qualification = artefact.qualification
        how = (
            "qualified here"
            if qualification and qualification.executed
            else "to be qualified on the device"
        )
        lines.append(f"artefact  {artefact.name}, {how}")
    if manifest.latency:
        p50, p99 = manifest.latency.p50_ms, manifest.latency.p99_ms
        lines.append(f"latency   p50 {p50:.3g} ms, p99 {p99:.3g} ms")
    return "\n".join(lines) + "\n"


COMMAND = Command(
    summary="export a finished run's model, check it, and sign it as a bundle",
    extra="export",
    arguments=_arguments,
    run=_run,
    epilog=(
        "example:\n  fedge release runs/digits --key release.key --out model.fedge"
        "\n  fedge release runs/a --artifacts compiled --key release.key --out a.fedge"
    ),
)
