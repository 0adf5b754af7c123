"""The command line `fedge`: finds sub-commands by entry point, turns every failure into one line.

It imports no component. Each distribution that is installed may add commands to the group
``fedge.commands``; the module of a command is imported when the command is chosen, and all of
them, which are light, for ``--help``.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points, version
from typing import Final

from fedge.shared.cli.command import Command, Parser, guarded, missing_extra
from fedge.shared.errors import UsageError

GROUP: Final = "fedge.commands"

#: Named where a command's module does not load, so that its own extra is not known: brings all.
WIDEST_EXTRA: Final = "simulation"

#: Flower would report its use, look for updates, and write log lines in a format of its own.
FLOWER_ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_LOG_LEVEL": "CRITICAL",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process where None.

    Returns:
        The exit status, see ``fedge.shared.cli.command.guarded``.
    """
    before, chosen, after = _split(list(sys.argv[1:] if argv is None else argv))
    program = f"fedge {chosen}" if chosen else "fedge"
    return guarded(program, lambda: _dispatch(before, chosen, after))


def commands() -> dict[str, EntryPoint]:
    """The installed sub-commands by name, sorted; nothing is imported."""
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    return dict(sorted(entries.items()))


def load(entry: EntryPoint) -> Command:
    """Import a sub-command's module.

    Raises:
        UsageError: 101, the module needs a package that is not installed.
        TypeError: the entry point names something else than a command.
    """
    with missing_extra(f"fedge {entry.name}", WIDEST_EXTRA):
        command = entry.load()
    if not isinstance(command, Command):
        raise TypeError(f"entry point {entry.name}: must be a Command, got {command!r}")
    return command


def parser_of(name: str, command: Command) -> ArgumentParser:
    """The argument parser of a sub-command, with the options that all of them have."""
    parser = Parser(
        prog=f"fedge {name}",
        description=f"{command.summary[:1].upper()}{command.summary[1:]}.",
        epilog=command.epilog or None,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.arguments(parser)
    _add_verbose(parser)
    return parser


def top_parser() -> ArgumentParser:
    """The parser of what stands before the command's name."""
    parser = Parser(
        prog="fedge",
        usage="fedge [-h] [--version] [-v] COMMAND ...",
        description="Federated training across sites, and the signed model on edge devices.",
        formatter_class=RawDescriptionHelpFormatter,
        add_help=False,  # as the list of commands is made only when help is wanted
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
    parser.add_argument("--version", action="version", version=f"fedge {version('fedge')}")
    _add_verbose(parser)
    return parser


def _split(arguments: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Options before the command, its name (empty where there is none), and the rest.

    No option of ``fedge`` itself takes a value, so the first word without a dash is the command.
    """
    at = next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    return list(arguments[:at]), "".join(arguments[at : at + 1]), list(arguments[at + 1 :])


def _dispatch(before: Sequence[str], chosen: str, after: Sequence[str]) -> int:
    installed = commands()
    top = top_parser()
    try:
        options = top.parse_args(before)
        if options.help or not chosen:
            top.epilog = _listing(installed)
            top.print_help()
            return 0
        if chosen not in installed:
            raise UsageError(
                102, f"fedge: unknown command {chosen!r}; {_nearest(chosen, installed)}"
            )
        for key, value in FLOWER_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        command = load(installed[chosen])
        namespace = parser_of(chosen, command).parse_args(after)
    except SystemExit as stop:  # argparse, once it has printed the help or the version
        return stop.code if isinstance(stop.code, int) else 0
    with (
        _logging(options.verbose + namespace.verbose),
        missing_extra(f"fedge {chosen}", command.extra),
    ):
        return command.run(_without_verbose(namespace))


def _listing(installed: Mapping[str, EntryPoint]) -> str:
    width = max((len(name) for name in installed), default=0)
    lines = []
    for name, entry in installed.items():
        try:
            summary = load(entry).summary
        except UsageError as error:
            summary = error.message
        except (
            Exception
        ) as error:  # one broken distribution must not hide the commands of the others
            summary = f"does not load: {type(error).__name__}: {error}"
        lines.append(f"  {name:{width}}  {summary}")
    return "\n".join(["commands (help of one: fedge COMMAND --help):", *lines])


def _nearest(word: str, installed: Mapping[str, EntryPoint]) -> str:
    close = difflib.get_close_matches(word, installed, n=1)
    return f"the nearest known is {close[0]!r}" if close else f"known are {', '.join(installed)}"


def _add_verbose(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log more to stderr; -vv for all"
    )


def _without_verbose(namespace: Namespace) -> Namespace:
    """A command sees its own arguments only: logging is settled here."""
    return Namespace(**{key: value for key, value in vars(namespace).items() if key != "verbose"})


@contextmanager
def _logging(verbosity: int) -> Iterator[None]:
    """Send the log to stderr while a command runs: warnings, with -v information, with -vv all."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    if verbosity < 2:
        # Flower logs every step at INFO; fedge's own lines say the same once.
        handler.addFilter(
            lambda record: (
                record.levelno >= logging.WARNING or record.name.partition(".")[0] != "flwr"
            )
        )
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
