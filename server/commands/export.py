"""`fedge export`: the bare ONNX file of a trained model, compared with it."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from fedge.shared.cli.command import Command


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_DIR|CHECKPOINT",
        help="a finished run, or a safetensors file",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="for example model.onnx"
    )
    parser.add_argument(
        "--task", metavar="NAME", help="of a CHECKPOINT outside its run's directory"
    )


def _run(arguments: Namespace) -> int:
    from fedge.server.release.pipeline import export

    parity, size = export(arguments.source, arguments.out, task=arguments.task)
    sys.stdout.write(
        f"exported  {arguments.out} ({size:,} bytes)\n"
        f"parity    within {parity.max_abs_difference:.2g} of the trained model\n"
        "It takes what preprocessing gives, and nothing signs it: `fedge release` makes a bundle of both.\n"
    )
    return 0


COMMAND = Command(
    summary="write a trained model as a bare ONNX file",
    extra="export",
    arguments=_arguments,
    run=_run,
    epilog="example:\n  fedge export runs/digits --out model.onnx",
)
