"""What both command lines do with arguments and failures: one line on stderr, and an exit status that says which.

Standard library only, as a device and an installation without any extra use it too.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, NoReturn

from fedge.shared.errors import FedgeError, UsageError, one_line

FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells report it
STDOUT_CLOSED: Final = 141  # 128 + SIGPIPE
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Parser(ArgumentParser):
    """Raises instead of printing its usage: an error has one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Raises:
            UsageError: 102.
        """
        raise UsageError(102, f"{self.prog}: {message}")


def guarded(program: str, work: Callable[[], int]) -> int:
    """Do the work of a command line; every failure becomes one line on stderr and an exit status.

    Args:
        program: as failures name it.
        work: returns the exit status where all is well.

    Returns:
        Its status, or 1 failure, 2 wrong usage, 130 interrupted, 141 where the reader of the output has
        closed it. FEDGE_DEBUG=1 prints the trace above the line.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal or file of another encoding must not end a command over one character.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = work()
        sys.stdout.flush()
    except FedgeError as error:
        return _report(error, WRONG_USAGE if error.code == 102 else FAILED)
    except KeyboardInterrupt:
        return _report(UsageError(103, f"{program}: interrupted"), INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            _drop_stdout()
            return STDOUT_CLOSED
        return _report(unexpected(program, error), FAILED)
    return status


def unexpected(program: str, error: Exception) -> UsageError:
    """The error that reports an unforeseen exception: 107 where there is no room to write, else 104.

    Args:
        program: as failures name it.
        error: the exception.
    """
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        message = f"{program}: cannot write {error.filename or 'its output'} ({error.strerror})"
        return UsageError(107, message)
    text = f": {error}" if str(error) else ""
    return UsageError(104, f"{program}: unexpected {type(error).__name__}{text}")


@contextmanager
def missing_extra(where: str, extra: str) -> Iterator[None]:
    """Report a missing package by the name of the extra that installs it.

    A module missing from fedge itself, or from an installed package, is a defect and is raised as it is.

    Args:
        where: command at fault, as failures name it.
        extra: the extra.

    Raises:
        UsageError: 101.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == "fedge" or package in sys.stdlib_module_names:
            raise
        if find_spec(package) is not None:
            raise
        raise UsageError(
            101,
            f"{where} needs fedge with its extra `{extra}` ({package} is missing)",
        ) from error


def _report(error: FedgeError, status: int) -> int:
    if os.environ.get("FEDGE_DEBUG") == "1":
        traceback.print_exc()
    print(one_line(error), file=sys.stderr)  # noqa: T201 - the one place that prints errors
    try:
        if sys.stdout is not None:  # closed before the start
            sys.stdout.flush()
    except OSError:  # the interpreter would try again, and complain on a line of its own
        _drop_stdout()
    return status


def _stdout_is_closed() -> bool:
    """Whether the other end of stdout's pipe is closed, as after `| head`."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # stdout is no file, or is closed
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


@dataclass(frozen=True)
class Command:
    """A sub-command of ``fedge``.

    Attributes:
        summary: one line for ``fedge --help``.
        extra: the pip extra that brings what ``run`` imports, for example ``"simulation"``.
        arguments: adds the command's arguments to its parser.
        run: does the work and returns the exit status; raises ``FedgeError``.
        epilog: lines shown under the options, at least an example.
    """

    summary: str
    extra: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    epilog: str = ""
