"""How the worker's process serves a connection: read the request, check it against the policy, answer.

Training and evaluation run one at a time. Other requests (``status``, ``permit``, a probe) are answered at
once by the connection's own thread. The last reply of each kind is kept as bytes: a server or a relay
that died and repeats its request gets the same bytes, and nothing is trained twice.
A computation that hangs would block all others: after the deadline the process requests its own restart.
"""

from __future__ import annotations

import hashlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from flwr.app import ConfigRecord, RecordDict

from fedge.client.relay.worker_client import PERMIT, STATUS
from fedge.client.settings import policy
from fedge.client.settings.policy import Policy, PolicyFile
from fedge.client.training import device as devices
from fedge.client.worker.handlers import EVALUATIONS, TASK_FAILED, SiteWorker
from fedge.shared import protocol
from fedge.shared.errors import FedgeError, SiteError
from fedge.shared.secagg import messages
from fedge.shared.wire import frames

log = logging.getLogger(__name__)

#: Run and round of the request that a thread answers, for its log records.
RUN: ContextVar[str] = ContextVar("run", default="-")
ROUND: ContextVar[int | str] = ContextVar("round", default="-")

#: Connections at a time; one more is closed at once, and its relay retries.
MAX_CONNECTIONS: Final = 16
#: Seconds to read a request and to write a reply; both ends are on one machine.
READ_WITHIN: Final = 60.0
WRITE_WITHIN: Final = 60.0
#: Exit status that requests a restart from the supervisor: for a new device context, or another memory bound.
RESTART: Final = 75

_LOOK: Final = 0.5
_NO_POLICY_LIMIT: Final = 2**20
_CACHED: Final = (protocol.TRAIN, *EVALUATIONS, messages.STATISTICS)
_REFUSED, _MALFORMED = 418, 414


class _NoReplyError(Exception):
    """The relay has disconnected, or must ask the next process: no reply is sent."""


@dataclass(frozen=True)
class _Last:
    kind: str
    run: str
    server_round: int
    at: float


@dataclass(frozen=True)
class _CachedReply:
    run: str
    server_round: int
    digest: bytes
    reply: list[bytes]


class Service:
    """Answers connections for one worker.

    Args:
        worker: the site's worker.
        policies: the site's policy, read again when its file changes.
        wait: seconds that a request may wait for earlier ones, and that one computation may take.
        stop: called to end the process with an exit status.
    """

    def __init__(
        self,
        worker: SiteWorker,
        policies: PolicyFile,
        wait: float,
        stop: Callable[[int], None],
    ) -> None:
        self._worker, self._policies, self._wait, self._stop = worker, policies, wait, stop
        self._machine = _machine(policies.current())
        self._computing = threading.Lock()
        self._replies: dict[str, _CachedReply] = {}
        self._last: _Last | None = None
        self._started = time.monotonic()
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._open: set[threading.Thread] = set()

    def take(self, connection: socket.socket) -> None:
        """Answer a connection in a thread of its own, or close it where there are too many."""
        if not self._places.acquire(blocking=False):
            log.warning("connections: must be at most %d, got more", MAX_CONNECTIONS)
            connection.close()
            return
        thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
        self._open.add(thread)
        try:
            thread.start()
        except RuntimeError:  # the memory bound leaves no room for a stack
            self._open.discard(thread)
            self._places.release()
            connection.close()
            log.exception("a connection was closed")

    def drain(self, seconds: float) -> None:
        """Wait at most ``seconds`` for open connections to finish."""
        until = time.monotonic() + seconds
        for thread in list(self._open):
            thread.join(max(until - time.monotonic(), 0.0))

    def _serve(self, connection: socket.socket) -> None:
        code = 0
        try:
            with connection:
                parts, code = self._reply(connection)
                frames.send(connection, parts, time.monotonic() + WRITE_WITHIN)
                _linger(connection)
        except (_NoReplyError, OSError, EOFError) as error:
            log.info("a connection ended early: %s", error)
        except Exception:
            log.exception("a connection failed")
        finally:
            self._places.release()
            self._open.discard(threading.current_thread())
            if code == devices.DEVICE_FAILED:
                self._stop(RESTART)

    def _reply(self, connection: socket.socket) -> tuple[list[bytes], int]:
        """A reply's frame, and the error's number, 0 for none."""
        try:
            body = frames.receive(connection, self._limit(), time.monotonic() + READ_WITHIN)
            request = frames.decode_request(body)
            return self._answer(request, body, connection), 0
        except frames.WireError as error:
            code = _REFUSED if isinstance(error, frames.TooLargeError) else _MALFORMED
            log.error("FE-%d %s", code, error)
        except FedgeError as error:
            code = error.code
            log.error("refused: %s", error)
        except (_NoReplyError, OSError, EOFError):
            raise
        except Exception as error:
            code = devices.error_code(error) or TASK_FAILED
            log.exception("FE-%d the request failed", code)
        return frames.encode_reply(code), code

    def _limit(self) -> int:
        try:
            return self._policies.current().max_request_mib * 2**20
        except SiteError:  # without a policy only the worker's status is served
            return _NO_POLICY_LIMIT

    def _answer(
        self, request: frames.Request, body: bytearray, connection: socket.socket
    ) -> list[bytes]:
        if request.kind == STATUS:
            return frames.encode_reply(RecordDict({"status": self._status()}))
        allowed = self._policies.current()
        if request.kind == PERMIT:
            policy.approve(allowed, request.bundle)
            return frames.encode_reply(RecordDict())
        run, server_round = _address(request.content)
        RUN.set(run)
        ROUND.set(server_round)
        policy.allow(allowed, request.kind, request.content, request.bundle)
        if request.kind == protocol.PROBE:
            return frames.encode_reply(self._worker.answer(request.kind, request.content))
        digest = hashlib.sha256(body).digest()
        with self._exclusive(connection):
            if _machine(self._policies.current()) != self._machine:
                self._stop(RESTART)
                raise _NoReplyError("the policy names another device or memory bound")
            with self._watched(request.kind, run, server_round):
                return self._work(request, run, server_round, digest)

    def _work(
        self, request: frames.Request, run: str, server_round: int, digest: bytes
    ) -> list[bytes]:
        last = self._replies.get(request.kind)
        if last and (last.run, last.server_round, last.digest) == (run, server_round, digest):
            log.info("%s: asked again, answered with the same reply", request.kind)
            return last.reply
        self._last = _Last(request.kind, run, server_round, time.monotonic())
        started = time.monotonic()
        reply = frames.encode_reply(self._worker.answer(request.kind, request.content))
        log.info("%s: answered in %.2f s", request.kind, time.monotonic() - started)
        if request.kind in _CACHED:
            self._replies[request.kind] = _CachedReply(run, server_round, digest, reply)
        return reply

    @contextmanager
    def _exclusive(self, connection: socket.socket) -> Iterator[None]:
        """Wait for earlier requests to finish, but only while this one's relay stays connected.

        Raises:
            SiteError: 420, they took too long.
        """
        until = time.monotonic() + self._wait
        while not self._computing.acquire(timeout=_LOOK):
            if _hung_up(connection):
                raise _NoReplyError("the relay has disconnected")
            if time.monotonic() > until:
                raise SiteError(420, f"start: must be within {self._wait:g} s, got none")
        try:
            if _hung_up(connection):
                raise _NoReplyError("the relay has disconnected")
            yield
        finally:
            self._computing.release()

    @contextmanager
    def _watched(self, kind: str, run: str, server_round: int) -> Iterator[None]:
        """End the process if a computation hangs; its supervisor starts another, which gets the request again."""

        def hangs() -> None:
            RUN.set(run)
            ROUND.set(server_round)
            log.critical(
                "FE-%d %s: must be computed within %g s, got none; the worker is restarted",
                TASK_FAILED,
                kind,
                self._wait,
            )
            self._stop(RESTART)

        timer = threading.Timer(self._wait, hangs)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _status(self) -> ConfigRecord:
        now = time.monotonic()
        status = ConfigRecord(
            {
                "pid": os.getpid(),
                "site": self._worker.site,
                "task": self._worker.task.name,
                "device": str(self._worker.learner.device),
                "busy": self._worker.busy,
                "uptime": now - self._started,
            }
        )
        if last := self._last:
            status["last-kind"], status["last-run"] = last.kind, last.run
            status["last-round"], status["last-seconds"] = last.server_round, now - last.at
        return status


def _machine(allowed: Policy) -> tuple[str, float | None, float]:
    """The settings of a policy that a running process cannot change: device and memory bounds."""
    return allowed.device, allowed.memory_gib, allowed.gpu_memory_fraction


def _address(content: RecordDict) -> tuple[str, int]:
    """Run and round for the log and the cached reply; they are validated elsewhere."""
    config = content.get(protocol.CONFIG)
    if not isinstance(config, ConfigRecord):
        return "-", 0
    number = config.get(protocol.SERVER_ROUND)
    run = str(config.get(protocol.RUN_ID))[:64]
    return run if run.isprintable() else "-", number if isinstance(number, int) else 0


def _hung_up(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def _linger(connection: socket.socket) -> None:
    """Shut the connection down, so that a relay that still sends stops and reads the reply."""
    connection.shutdown(socket.SHUT_RDWR)
