"""Forks of one process that has imported torch already, for daemons that have not and must not.

A worker of its own interpreter imports torch anew, seconds of processor time each. `fedge up` therefore has one process
that imports it once, makes no thread, and forks for the daemons: each asks over a Unix socket for one of a few
programs. The connection lives as long as the fork. Over it the daemon is told the process id and how the fork ended;
where it closes first, as the daemon has died, the fork is sent SIGTERM. So a fork that is not the daemon's child is
started, watched and ended like one. Requests are JSON, nothing is unpickled.
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
    """A fork of the server's, as the daemon that asked for it sees it.

    Attributes:
        pid: its process id. Nobody else has it before ``ended`` has told the status.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self._connection, self._born = connection, process.birth(pid)
        connection.setblocking(False)

    def ended(self) -> int | None:
        """Its wait status, None while it runs; that of SIGTERM where the server has died, which ends it so."""
        try:
            told = self._connection.recv(_NUMBER.size)
        except BlockingIOError:
            return None
        except OSError:
            told = b""
        if len(told) < _NUMBER.size:
            if self._born is not None and process.birth(self.pid) == self._born:
                return None
            status: int = signal.SIGTERM
        else:
            (status,) = _NUMBER.unpack(told)
        self.close()
        return status

    def close(self) -> None:
        """Watch it no more; where it runs, it is ended."""
        self._connection.close()


def ask(program: Program) -> Remote | None:
    """Ask for the fork of a program that names a server; None where that does not answer."""
    wanted = program.preloaded
    if wanted is None:
        return None
    request = {
        "name": wanted.name,
        "arguments": list(wanted.arguments),
        "title": program.title,
        "log": str(program.log),
        "environment": {**os.environ, **program.environment},
    }
    try:
        connection = sockets.connect(wanted.socket, _FORKED_WITHIN)
    except OSError as error:
        _log.warning("%s: nobody forks it (%s); a new process imports anew", program.title, error)
        return None
    try:
        connection.sendall(json.dumps(request).encode() + b"\n")
        told = connection.recv(_NUMBER.size)
        if len(told) == _NUMBER.size:
            return Remote(connection, *_NUMBER.unpack(told))
    except OSError as error:
        _log.warning("%s: is not forked (%s); a new process imports anew", program.title, error)
    connection.close()
    return None


def serve(listener: socket.socket, programs: Mapping[str, Run]) -> NoReturn:
    """Fork for whoever asks, until a signal ends this process, and its forks with it.

    Args:
        listener: as ``sockets.listen`` gives it, for this user alone.
        programs: what may be asked for.

    Raises:
        RuntimeError: this process has threads, which no fork would have.
    """
    # OpenBLAS ends its own threads before a fork, and starts them again where they are needed.
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    if (tasks := sum(1 for _ in Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError(f"threads before a fork: must be 1, got {tasks}")
    # What was imported is shared with the forks for as long as nobody writes to it.
    gc.collect()
    gc.freeze()
    # An interrupt from the keyboard is for the command, which ends the daemons first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Server(listener, programs).run()


@dataclass
class _Fork:
    pid: int
    # None where the daemon has gone.
    connection: socket.socket | None
    told: bool = False


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
        with suppress(OSError):  # its daemon has gone, which is seen below
            connection.send(_NUMBER.pack(pid))
        self._forks.append(fork)
        self._selector.register(
            connection, selectors.EVENT_READ, partial(self._closed, fork, connection)
        )

    def _program(self, request: dict[str, Any]) -> Program:
        run = self._programs[request["name"]]
        arguments = [str(word) for word in request["arguments"]]
        environment = {str(name): str(value) for name, value in request["environment"].items()}
        function = partial(_as_asked, run, arguments, environment)
        return Program(str(request["title"]), Path(request["log"]), function=function)

    def _closed(self, fork: _Fork, connection: socket.socket) -> None:
        """Nobody watches the fork any more: its daemon has taken the status, or died."""
        self._selector.unregister(connection)
        connection.close()
        fork.connection = None
        if not fork.told:
            os.kill(fork.pid, signal.SIGTERM)

    def _over(self, fork: _Fork) -> bool:
        """Whether nothing is left to do; until then the process id stays taken, if only by a zombie."""
        if not fork.told:
            found = os.waitid(os.P_PID, fork.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                return False
            fork.told = True
            if fork.connection is not None:
                exited = found.si_code == os.CLD_EXITED
                status = found.si_status << 8 if exited else found.si_status
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
    found = json.loads(received)
    if not isinstance(found, dict):
        raise ValueError("must be a JSON object")
    return found


def _as_asked(run: Run, arguments: Sequence[str], environment: Mapping[str, str]) -> int | None:
    """The program in a fork, under the daemon's environment instead of this process's."""
    os.environ.clear()
    os.environ.update(environment)
    return run(arguments)
