"""The command line `fedge-edge`: what a device does with a bundle."""

from __future__ import annotations

import os
import sys
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final, NoReturn

from fedge.edge import bench, predict, verify
from fedge.shared.errors import FedgeError, UsageError, one_line

COMMANDS: Final = {"verify": verify.COMMAND, "predict": predict.COMMAND, "bench": bench.COMMAND}

FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells report it
STDOUT_CLOSED: Final = 141  # 128 + SIGPIPE


class _Parser(ArgumentParser):
    """Raises instead of printing its usage: an error has one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(102, f"{self.prog}: {message}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process where None.

    Returns:
        The exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted, 141 where nobody
            reads the output.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _dispatch(argv)
        sys.stdout.flush()
    except FedgeError as error:
        return _report(error, WRONG_USAGE if error.code == 102 else FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return STDOUT_CLOSED
    except Exception as error:
        _drop_stdout()
        name = type(error).__name__
        return _report(UsageError(104, f"fedge-edge: unexpected {name}: {error}"), FAILED)
    return status


def parser() -> ArgumentParser:
    """The parser of the whole command line."""
    top = _Parser(
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
    try:
        return command.run(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == "fedge" or package in sys.stdlib_module_names:
            raise
        install = f"pip install 'fedge[{command.extra}]'"
        raise UsageError(
            101, f"fedge-edge {arguments.action} needs {package}: {install}"
        ) from error


def _version() -> str:
    try:
        return version("fedge")
    except PackageNotFoundError:
        return "unknown"


def _report(error: FedgeError, status: int) -> int:
    if os.environ.get("FEDGE_DEBUG") == "1":
        traceback.print_exc()
    print(one_line(error), file=sys.stderr)  # noqa: T201 - the one place that prints errors
    return status


def _drop_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain."""
    try:
        descriptor = sys.stdout.fileno()
        nothing = os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError, AttributeError):  # stdout is no file, or is closed
        return
    os.dup2(nothing, descriptor)
    os.close(nothing)
