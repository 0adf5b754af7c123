"""The command line `fedge-edge`: what a device does with a bundle."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from fedge.edge.commands import bench, install, predict, verify
from fedge.edge.serving import command as serve
from fedge.shared.cli.command import Parser, guarded, missing_extra

COMMANDS: Final = {
    "verify": verify.COMMAND,
    "install": install.COMMAND,
    "predict": predict.COMMAND,
    "bench": bench.COMMAND,
    "serve": serve.COMMAND,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process where None.

    Returns:
        The exit status, see ``fedge.shared.cli.command.guarded``.
    """
    return guarded("fedge-edge", lambda: _dispatch(argv))


def parser() -> ArgumentParser:
    """The parser of the whole command line."""
    top = Parser(
        prog="fedge-edge",
        description="Run signed models on a device.",
        epilog="example:\n  fedge-edge verify model.fedge --trust release.key.pub",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"fedge-edge {_version()}")
    actions = top.add_subparsers(dest="action", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = actions.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=command.epilog,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.arguments(sub)
    return top


def _dispatch(argv: Sequence[str] | None) -> int:
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:  # argparse, once it has printed the help or the version
        return stop.code if isinstance(stop.code, int) else 0
    command = COMMANDS[arguments.action]
    with missing_extra(f"fedge-edge {arguments.action}", command.extra):
        return command.run(arguments)


def _version() -> str:
    try:
        return version("fedge")
    except PackageNotFoundError:
        return "unknown"
