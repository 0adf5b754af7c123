"""Child processes of a daemon: started by exec or by fork, ended with their parent, logged to a file.

A fork of a process that has imported Flower already costs some 20 ms where a new interpreter with the same imports
costs two seconds of CPU, which is what makes a short exchange short. Forking is safe only from a process
without threads of Python's; a daemon has none (those of NumPy's OpenBLAS know how to be forked).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NoReturn

from fedge.shared.daemon import logs
from fedge.shared.errors import FedgeError, one_line

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
#: sysexits: an internal error of the software.
_EX_SOFTWARE = 70


@dataclass(frozen=True)
class Preloaded:
    """A program of a process that has the imports already and forks, see ``fork_server``.

    Attributes:
        socket: on which that process listens.
        name: of one of its programs.
        arguments: of that program.
    """

    socket: Path
    name: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """What a child process runs.

    Attributes:
        title: as process listings show it; of an exec its command line.
        log: file that takes standard output and standard error.
        command: to execute; empty for a fork.
        function: to call in a fork, giving the exit status; None for an exec.
        environment: added to this process's own.
        terminal: keep standard streams and process group, for what talks to a person.
        preloaded: a quicker way to the same, tried first by a supervisor.
    """

    title: str
    log: Path
    command: tuple[str, ...] = ()
    function: Callable[[], int | None] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    terminal: bool = False
    preloaded: Preloaded | None = None


@cache
def _console_scripts() -> Mapping[str, EntryPoint]:
    """Of all installed distributions; to read their metadata costs as much as a fork does."""
    return {entry.name: entry for entry in entry_points(group="console_scripts")}


def preload(modules: Iterable[str]) -> None:
    """Import modules, and read what is installed, for all forks to come.

    Without the garbage collector, which would look again and again through what imports make and find nothing.
    """
    gc.disable()
    try:
        for name in modules:
            import_module(name)
    finally:
        gc.enable()
    _console_scripts()


def script(name: str, arguments: Sequence[str]) -> Callable[[], int | None]:
    """A console script of an installed distribution, to be called in a fork.

    Raises:
        LookupError: it is not installed.
    """
    entry = _console_scripts().get(name)
    if entry is None:
        raise LookupError(f"console script {name}: must be installed, got none")

    def run() -> int | None:
        sys.argv = [name, *arguments]
        # Its level was fixed at the import, by the environment of the command that became the daemon.
        flower = logging.getLogger("flwr")
        flower.setLevel(logging.INFO)
        for handler in flower.handlers:
            handler.setLevel(logging.INFO)
        result = entry.load()()
        return result if isinstance(result, int) else None

    return run


def start(program: Program) -> int:
    """Start the child.

    Returns:
        Its process id.
    """
    program.log.parent.mkdir(parents=True, exist_ok=True)
    if program.log.is_file() and program.log.stat().st_size > logs.LIMIT:
        program.log.replace(logs.aside(program.log))
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        _child(program, parent)
    return pid


def _child(program: Program, parent: int) -> NoReturn:
    status = _EX_SOFTWARE
    try:
        _settle(program, parent)
        if program.function is None:
            os.execvpe(program.command[0], program.command, os.environ)  # noqa: S606
        set_title(program.title)
        status = program.function() or 0
    except BaseException as error:
        status = _report(error)
    finally:
        # Whatever fails here, a full disk for one, this process must not go on as if it were the parent.
        with suppress(BaseException):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _report(error: BaseException) -> int:
    """Log what ended the fork, and return its exit status."""
    with suppress(Exception):
        if isinstance(error, SystemExit):
            if error.code is None or isinstance(error.code, int):
                return error.code or 0
            sys.stderr.write(f"{error.code}\n")
            return 1
        if isinstance(error, KeyboardInterrupt):
            return 128 + signal.SIGINT
        if isinstance(error, FedgeError):
            sys.stderr.write(one_line(error) + "\n")
            return 1
        traceback.print_exception(error)
    return _EX_SOFTWARE


def _settle(program: Program, parent: int) -> None:
    """Make the fork a process of its own: signals, streams, group, environment."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    die_with_parent()
    if os.getppid() != parent:
        # The parent died before the request above was in force.
        os._exit(_EX_SOFTWARE)
    os.environ.update(program.environment)
    if not program.terminal:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDONLY)
        log = os.open(program.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        # Whatever the parent had put there (a test's capture, a progress bar) is not ours.
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.closerange(3, 4096)
    if program.function is not None:
        root = logging.getLogger()
        for handler in list(root.handlers):
            root.removeHandler(handler)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the kernel for a signal at the parent's death, so that a killed daemon leaves nothing behind."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


def forbid_core_dumps() -> None:
    """Have the kernel write no core of this process, which would hold its data and keys.

    The limit alone does not hold where ``core_pattern`` is a pipe. A process that is not dumpable (prctl(2)) has no
    core there either, and no other process of its user reads its memory. A child that is executed asks for itself.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def set_title(title: str) -> None:
    """Set the title that process listings show for this process."""
    import setproctitle

    setproctitle.setproctitle(title)


def birth(pid: int) -> int | None:
    """When a process started, in the kernel's clock ticks since boot; with the pid it identifies a process uniquely.

    None where there is no such process, or only its zombie.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold anything, so fields count from its end.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


@cache
def boot() -> str:
    """Id of the machine's current boot; pids and start times are comparable within one only."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def end(pid: int, born: int | None, grace: float = 5.0) -> None:
    """End a process that need not be a child: SIGTERM, then after ``grace`` seconds SIGKILL.

    Nothing happens where the pid belongs to another process by now.
    """
    deadline = time.monotonic() + grace
    sent = None
    while born is not None and birth(pid) == born:
        number = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
        if number != sent:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return
            sent = number
        if time.monotonic() > deadline + grace:
            return
        time.sleep(0.05)
