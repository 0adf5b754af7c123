"""Forks of one process that has imported torch already, for daemons that have not and must not.

Each worker with its own interpreter imports torch again, which takes seconds of processor time. `fedge up` therefore
has one process that imports it once, makes no thread, and forks for the daemons: each requests one of a few programs
over a Unix socket. The connection lives as long as the fork. Over it the daemon gets the process id and the exit
status; where it closes first, as the daemon has died, the fork is sent SIGTERM. So a fork that is not the daemon's
child is started, watched and ended like one. Requests are JSON, nothing is unpickled.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import selectors
import signal
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

from fedge.shared.daemon import process, sockets
from fedge.shared.daemon.process import Program

_log = logging.getLogger(__name__)

#: What a fork may run, given its arguments; the exit status, as of ``Program.function``.
Run: TypeAlias = Callable[[Sequence[str]], int | None]

#: Seconds that a daemon waits for the fork, and this process for a daemon's request.
_FORKED_WITHIN, _READ_WITHIN = 8.0, 5.0
_MAX_REQUEST: Final = 256 * 1024
#: Answers: the process id, and later the wait status.
_NUMBER: Final = struct.Struct("<q")


class Remote:
    """Handle of a fork, for the daemon that requested it.

    Attributes:
        pid: its process id, which the kernel reuses only after ``ended`` has returned the status.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self._connection, self._born = connection, process.birth(pid)
        connection.setblocking(False)

    def ended(self) -> int | None:
        """Its wait status, None while it runs; that of SIGTERM where the fork server has died, which ends it."""
        try:
            answer = self._connection.recv(_NUMBER.size)
        except BlockingIOError:
            return None
        except OSError:
            answer = b""
        if len(answer) < _NUMBER.size:
            if self._born is not None and process.birth(self.pid) == self._born:
                return None
            status: int = signal.SIGTERM
        else:
            (status,) = _NUMBER.unpack(answer)
        self.close()
        return status

    def close(self) -> None:
        """Close the connection; where the fork still runs, it is ended."""
        self._connection.close()


def request_fork(program: Program) -> Remote | None:
    """Request a fork of a program from its fork server.

    Returns:
        Handle of the fork; None where the program names no fork server, or that does not answer.
    """
    preloaded = program.preloaded
    if preloaded is None:
        return None
    request = {
        "name": preloaded.name,
        "arguments": list(preloaded.arguments),
        "title": program.title,
        "log": str(program.log),
        "environment": {**os.environ, **program.environment},
    }
    try:
        connection = sockets.connect(preloaded.socket, _FORKED_WITHIN)
    except OSError as error:
        _log.warning(
            "%s: the fork server is not reachable (%s); a new process imports again",
            program.title,
            error,
        )
        return None
    try:
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer = connection.recv(_NUMBER.size)
        if len(answer) == _NUMBER.size:
            return Remote(connection, *_NUMBER.unpack(answer))
    except OSError as error:
        _log.warning("%s: is not forked (%s); a new process imports again", program.title, error)
    connection.close()
    return None


def serve(listener: socket.socket, programs: Mapping[str, Run]) -> NoReturn:
    """Serve requests for forks, until a signal ends this process, and its forks with it.

    Args:
        listener: as ``sockets.listen`` gives it, for this user alone.
        programs: those that may be requested, by name.

    Raises:
        RuntimeError: this process has threads, which no fork would have.
    """
    # OpenBLAS ends its own threads before a fork, and starts them again where they are needed.
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    if (tasks := sum(1 for _ in Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError(f"threads before a fork: must be 1, got {tasks}")
    # What was imported is shared with the forks until a process writes to it.
    gc.collect()
    gc.freeze()
    # An interrupt from the keyboard is for the command, which ends the daemons first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Server(listener, programs).run()


@dataclass
class _Fork:
    pid: int
    # None once the daemon has disconnected.
    connection: socket.socket | None
    reported: bool = False


class _Server:
    def __init__(self, listener: socket.socket, programs: Mapping[str, Run]) -> None:
        self._listener, self._programs = listener, programs
        self._forks: list[_Fork] = []
        self._selector = selectors.DefaultSelector()

    def run(self) -> NoReturn:
        woken, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(woken, selectors.EVENT_READ, lambda: woken.recv(4096))
        while True:
            for key, _ in self._selector.select():
                key.data()
            self._forks = [fork for fork in self._forks if not self._over(fork)]

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        try:
            connection.settimeout(_READ_WITHIN)
            pid = process.start(self._program(_line(connection)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("a request for a fork failed: %s", error)
            connection.close()
            return
        connection.setblocking(False)
        fork = _Fork(pid, connection)
        with suppress(OSError):  # its daemon has disconnected, which is seen below
            connection.send(_NUMBER.pack(pid))
        self._forks.append(fork)
        self._selector.register(
            connection, selectors.EVENT_READ, partial(self._closed, fork, connection)
        )

    def _program(self, request: dict[str, Any]) -> Program:
        run = self._programs[request["name"]]
        arguments = [str(word) for word in request["arguments"]]
        environment = {str(name): str(value) for name, value in request["environment"].items()}
        function = partial(_run_with_environment, run, arguments, environment)
        return Program(str(request["title"]), Path(request["log"]), function=function)

    def _closed(self, fork: _Fork, connection: socket.socket) -> None:
        """Handle the end of a connection: the daemon has taken the status, or died."""
        self._selector.unregister(connection)
        connection.close()
        fork.connection = None
        if not fork.reported:
            os.kill(fork.pid, signal.SIGTERM)

    def _over(self, fork: _Fork) -> bool:
        """Whether nothing is left to do; until then the process id stays taken, if only by a zombie."""
        if not fork.reported:
            result = os.waitid(os.P_PID, fork.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if result is None:
                return False
            fork.reported = True
            if fork.connection is not None:
                exited = result.si_code == os.CLD_EXITED
                status = result.si_status << 8 if exited else result.si_status
                with suppress(OSError):
                    fork.connection.send(_NUMBER.pack(status))
        if fork.connection is not None:
            return False
        os.waitpid(fork.pid, 0)
        return True


def _line(connection: socket.socket) -> dict[str, Any]:
    received = b""
    while not received.endswith(b"\n"):
        part = connection.recv(_MAX_REQUEST)
        received += part
        if not part or len(received) > _MAX_REQUEST:
            raise ValueError("must be one line of JSON")
    request = json.loads(received)
    if not isinstance(request, dict):
        raise ValueError("must be a JSON object")
    return request


def _run_with_environment(
    run: Run, arguments: Sequence[str], environment: Mapping[str, str]
) -> int | None:
    """The program in a fork, under the daemon's environment instead of this process's."""
    os.environ.clear()
    os.environ.update(environment)
    return run(arguments)
