"""``fedge down``: end a federation that ``fedge up`` left."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fedge.shared.cli.command import Command


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="run directory of the federation"
    )


def _run(arguments: Namespace) -> int:
    import sys

    from fedge.simulations.federation import down

    count = down(arguments.out)
    sys.stdout.write(f"{count} {'process' if count == 1 else 'processes'} ended\n")
    return 0


COMMAND = Command(
    summary="end a federation that `fedge up` left; --resume continues its run",
    extra="train",
    arguments=_arguments,
    run=_run,
    epilog="example:\n  fedge down --out runs/up",
)
