"""A daemon's only loop: starts its services, restarts those that die, serves its sockets, writes its status.

One thread, as forks come from here. Every service that ends is restarted after a pause that doubles from
``FIRST_PAUSE`` to ``LAST_PAUSE`` seconds and is forgotten once the service has run for ``STEADY`` seconds.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedge.shared.daemon import fork_server, logs, process
from fedge.shared.daemon.process import Program

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

FIRST_PAUSE, LAST_PAUSE, STEADY = 0.2, 10.0, 30.0
TICK = 0.1
#: Seconds between two checks of the sizes of the logs.
LOGS_EVERY = 60.0
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Seconds that a process has to end after SIGTERM.
GRACE = 5.0


@dataclass
class Service:
    """A process that is kept running.

    Attributes:
        name: in the status and of its log.
        program: makes the program, at each start.
        ready: whether it serves; polled until it is true.
        after: services that must be ready first.
        on_exit: called with the wait status when it has ended, before the restart.
        on_ready: called once a start, when it serves.
        grace: seconds that it has to end after SIGTERM.
        failures: ends in a row, forgotten once it has run for ``STEADY`` seconds.
    """

    name: str
    program: Callable[[], Program]
    ready: Callable[[], bool] = lambda: True
    after: tuple[str, ...] = ()
    on_exit: Callable[[int], None] | None = None
    on_ready: Callable[[], None] | None = None
    grace: float = GRACE
    failures: int = 0
    pid: int = 0
    born: int | None = None
    is_ready: bool = False
    restarts: int = 0
    since: float = 0.0
    due: float = 0.0
    pause: float = FIRST_PAUSE
    last_exit: str = ""


@dataclass
class _Task:
    name: str
    born: int | None
    started: float
    deadline: float | None
    on_exit: Callable[[int], None] | None


@dataclass
class Supervisor:
    """Services, tasks and sockets of one daemon.

    Attributes:
        home: folder of the daemon; takes status.json and log/.
        ticks: called about every ``TICK`` seconds; must not block.
        facts: what the daemon adds to its status.
    """

    home: Path
    ticks: list[Callable[[], None]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.services: dict[str, Service] = {}
        self._tasks: dict[int, _Task] = {}
        # Processes that are children of the fork server.
        self._remote: dict[int, fork_server.Remote] = {}
        self._logs_due = 0.0
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._written: str | None = None
        self._pid, self._born = os.getpid(), process.birth(os.getpid())
        self._signal = 0

    @property
    def ended_by(self) -> int:
        """The signal that ended the loop, 0 for none."""
        return self._signal

    def log_of(self, name: str) -> Path:
        """The log file of a process."""
        return self.home / "log" / f"{name}.log"

    def add(self, service: Service) -> Service:
        """Keep a service running from now on."""
        self.services[service.name] = service
        return service

    def serve(
        self, listener: socket.socket, on_connection: Callable[[socket.socket], None]
    ) -> None:
        """Call ``on_connection`` for every connection to a listening socket, and close the connection afterwards."""
        listener.setblocking(False)

        def accept() -> None:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.settimeout(1.0)
            try:
                on_connection(connection)
            except Exception as error:
                _log.warning("a request on a socket failed: %s", error)
            finally:
                connection.close()

        self._selector.register(listener, selectors.EVENT_READ, accept)

    def task(
        self,
        name: str,
        program: Program,
        on_exit: Callable[[int], None] | None = None,
        deadline: float | None = None,
    ) -> int:
        """Start a process that is expected to end.

        Args:
            name: in the status.
            program: what to run.
            on_exit: called with the wait status.
            deadline: seconds after which it is killed.

        Returns:
            Its process id.
        """
        pid = self._fork(program)
        ends = None if deadline is None else time.monotonic() + deadline
        self._tasks[pid] = _Task(name, process.birth(pid), time.monotonic(), ends, on_exit)
        return pid

    def alive(self, name: str) -> list[int]:
        """Process ids of the tasks of a name."""
        return [pid for pid, task in self._tasks.items() if task.name == name]

    def kill(self, pid: int, number: int = signal.SIGTERM) -> None:
        """Send a signal to one of this supervisor's processes; any other pid is ignored."""
        ours = pid in self._tasks or any(s.pid == pid for s in self.services.values())
        if ours and pid:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return

    def stop(self) -> None:
        """Leave the loop."""
        self._stopping = True

    def run(self) -> None:
        """Supervise until ``stop`` or SIGTERM or SIGINT, then end every child, services in reverse order."""
        # What was imported before the forks is shared with them until a process writes to it.
        gc.collect()
        gc.freeze()
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._selector.register(receiver, selectors.EVENT_READ, lambda: receiver.recv(4096))
        wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        # What nohup has set to be ignored stays ignored.
        handled = [n for n in _ENDING if signal.getsignal(n) is not signal.SIG_IGN]
        before = {n: signal.signal(n, self._on_signal) for n in handled}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        try:
            while not self._stopping:
                self._step()
                for key, _ in self._selector.select(TICK):
                    _safely(key.data)
                for tick in self.ticks:
                    _safely(tick)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            self._end_all()
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()
            sender.close()
            _safely(partial(self._write_status, force=True))

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signal = number
        self._stopping = True

    def _step(self) -> None:
        self._reap()
        now = time.monotonic()
        for service in self.services.values():
            if not service.pid:
                waits = any(not self.services[name].is_ready for name in service.after)
                if now >= service.due and not waits:
                    self._start(service, now)
            elif not service.is_ready:
                service.is_ready = bool(_safely(service.ready))
                if service.is_ready and service.on_ready is not None:
                    _safely(service.on_ready)
            if service.pid and now - service.since > STEADY:
                service.pause, service.failures = FIRST_PAUSE, 0
        for pid, task in list(self._tasks.items()):
            if task.deadline is not None and now > task.deadline:
                _log.error("%s (pid %d) passed its deadline and is killed", task.name, pid)
                self.kill(pid, signal.SIGKILL)
        if now >= self._logs_due:
            self._logs_due = now + LOGS_EVERY
            _safely(partial(logs.bound, self.home / "log"))
        _safely(self._write_status)

    def _start(self, service: Service, now: float) -> None:
        pid = _safely(lambda: self._fork(service.program()))
        if pid is None:
            self._put_off(service)
            return
        service.pid = pid
        service.born = process.birth(service.pid)
        service.since, service.is_ready = now, False
        _log.info("%s started, pid %d", service.name, service.pid)

    def _fork(self, program: Program) -> int:
        remote = fork_server.request_fork(program)
        if remote is None:
            return process.start(program)
        self._remote[remote.pid] = remote
        return remote.pid

    def _status(self, pid: int) -> int | None:
        """Wait status of a process that we have started, None while it runs."""
        remote = self._remote.get(pid)
        if remote is None:
            return _ended(pid)
        status = remote.ended()
        if status is not None:
            del self._remote[pid]
        return status

    def _reap(self) -> None:
        for service in self.services.values():
            if service.pid and (status := self._status(service.pid)) is not None:
                self._ended(service, status)
        for pid in list(self._tasks):
            if (status := self._status(pid)) is not None:
                task = self._tasks.pop(pid)
                if (on_exit := task.on_exit) is not None:
                    _safely(partial(on_exit, status))

    def _ended(self, service: Service, status: int) -> None:
        pid, service.pid, service.is_ready = service.pid, 0, False
        service.last_exit = words(status)
        service.restarts += 1
        self._put_off(service)
        _log.warning("%s (pid %d) %s; starting it again", service.name, pid, service.last_exit)
        if service.on_exit is not None:
            _safely(partial(service.on_exit, status))

    def _put_off(self, service: Service) -> None:
        service.failures += 1
        service.due = time.monotonic() + service.pause
        service.pause = min(service.pause * 2, LAST_PAUSE)

    def _end_all(self) -> None:
        self._end(list(self._tasks), GRACE)
        while living := [s for s in self.services.values() if s.pid]:
            # Services that others depend on end last: a site unregisters from a server that still listens.
            needed = {name for service in living for name in service.after}
            leaves = [s for s in living if s.name not in needed] or living
            self._end([s.pid for s in leaves], max(s.grace for s in leaves))
            for service in leaves:
                service.pid, service.is_ready = 0, False

    def _end(self, pids: list[int], grace: float) -> None:
        deadline = time.monotonic() + grace
        for pid in pids:
            _signal(pid, signal.SIGTERM)
        left, killed = list(pids), False
        while left := [pid for pid in left if self._status(pid) is None]:
            if not killed and time.monotonic() > deadline:
                killed = True
                for pid in left:
                    _signal(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _write_status(self, *, force: bool = False) -> None:
        """Write status.json where anything in it has changed."""
        processes = {
            s.name: {
                "pid": s.pid,
                "born": s.born,
                "state": "ready" if s.is_ready else "starting" if s.pid else "down",
                "restarts": s.restarts,
                "last_exit": s.last_exit,
            }
            for s in self.services.values()
        }
        tasks = [
            {"name": t.name, "pid": pid, "born": t.born} for pid, t in sorted(self._tasks.items())
        ]
        content: dict[str, Any] = {
            "boot": process.boot(),
            "pid": self._pid,
            "born": self._born,
            "services": processes,
        }
        content |= {"tasks": tasks, **self.facts}
        text = json.dumps(content)
        if text != self._written or force:
            self._written = text
            stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            # Replaced as a whole, but not flushed to the disk: after a crash of the machine it would be wrong anyway.
            temporary = self.home / ".status.json.tmp"
            temporary.write_text(json.dumps({"updated": stamp, **content}, indent=1) + "\n")
            temporary.replace(self.home / "status.json")


def _safely(function: Callable[[], _T]) -> _T | None:
    """One failure, a full disk or a folder that cannot be read, must not end the daemon and all below it."""
    try:
        return function()
    except Exception:
        _log.exception("a step of the daemon failed")
        return None


def words(status: int) -> str:
    """A wait status as text."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exited with {os.WEXITSTATUS(status)}"


def _ended(pid: int) -> int | None:
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return status if ended else None


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
