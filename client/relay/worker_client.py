"""The relay's end of the socket to the site's resident worker.

Requests are idempotent, so a request is retried when the worker is not running or dies while it computes: its
supervisor restarts it, and it answers the same request with the same bits. A request over which it
died three times is not retried.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any, Final

from flwr.app import ConfigRecord, RecordDict

from fedge.shared.daemon import sockets
from fedge.shared.error_catalogue import CATALOGUE
from fedge.shared.errors import SiteError
from fedge.shared.wire import frames

#: Environment of the relay's process: where the worker listens, seconds to wait for a reply, and the
#: SHA-256 of the Flower bundle that the launcher found before any of its code ran.
SOCKET_VARIABLE: Final = "FEDGE_WORKER_SOCKET"
DEADLINE_VARIABLE: Final = "FEDGE_WORKER_DEADLINE"
BUNDLE_VARIABLE: Final = "FEDGE_BUNDLE"

DEFAULT_DEADLINE: Final = 3600.0
#: Kinds of requests that never leave the site.
PERMIT: Final = "worker.permit"
STATUS: Final = "worker.status"

#: Deaths of the worker over one request (fully sent, then the connection ended) after which it is not retried.
DEATHS: Final = 3

_PAUSE: Final = 0.2
_SHORT: Final = 5.0
_FAILED: Final = 413
_TIMED_OUT: Final = 420
#: Errors of a connection to a worker that is restarting.
_DISCONNECTED: Final = (ConnectionError, FileNotFoundError, BlockingIOError, EOFError)


class _DiedError(Exception):
    """The connection ended after the worker had the whole request."""


class SocketLink:
    """A worker behind a Unix stream socket.

    Args:
        path: of the socket, of any length.
        deadline: seconds from the request to the reply, the worker's restarts included.
        bundle: SHA-256 of the Flower bundle that this process runs; by default from the environment.
    """

    def __init__(self, path: Path, deadline: float, bundle: str | None = None) -> None:
        self.path = path
        self.deadline = deadline
        self._bundle = os.environ.get(BUNDLE_VARIABLE, "") if bundle is None else bundle

    def exchange(self, kind: str, content: RecordDict) -> RecordDict:
        """Send a request to the worker, with retries while it is not running.

        Raises:
            SiteError: the worker's own error number; 413, it died three times over the request; 420, it
                did not answer in time.
        """
        return self._ask(frames.Request(kind, content, self._bundle), self.deadline)

    def permit(self, bundle: str) -> None:
        """Check that the site approved a Flower bundle; to be called before any of its code runs.

        Args:
            bundle: its SHA-256 in hexadecimal.

        Raises:
            SiteError: 419, it is not approved; 413 or 420, the worker does not answer.
        """
        self._ask(frames.Request(PERMIT, RecordDict(), bundle), self.deadline)

    def status(self) -> dict[str, Any]:
        """Ask the worker for its status, once and with a short deadline.

        Returns:
            ``pid``, ``site``, ``task``, ``device``, ``busy``, ``uptime`` (seconds), and after the first request
            ``last-kind``, ``last-run``, ``last-round`` and ``last-seconds`` (since then). Nothing that depends on the
            data: the relay asks this too, and may have been taken over.

        Raises:
            SiteError: 420, it does not answer.
        """
        reply = self._ask(
            frames.Request(STATUS, RecordDict()), min(self.deadline, _SHORT), once=True
        )
        status = reply.get("status")
        if not isinstance(status, ConfigRecord):
            raise SiteError(
                _TIMED_OUT, f"{self.path}: must answer with a status, got another record"
            )
        return dict(status)

    def _ask(self, request: frames.Request, deadline: float, *, once: bool = False) -> RecordDict:
        until = time.monotonic() + deadline
        try:
            parts = frames.encode_request(request)
        except frames.WireError as error:
            raise SiteError(414, f"{request.kind}: {error}") from None
        deaths = 0
        while True:
            try:
                body = self._once(parts, until)
                break
            except TimeoutError:
                raise self._timed_out(f"none within {deadline:g} s") from None
            except (*_DISCONNECTED, _DiedError) as error:
                if once or time.monotonic() + _PAUSE >= until:
                    why = str(error) or type(error).__name__
                    raise self._timed_out(f"none within {deadline:g} s ({why})") from None
                deaths += isinstance(error, _DiedError)
                if deaths == DEATHS:
                    raise SiteError(
                        _FAILED,
                        f"{request.kind}: must be answered, got none: the worker died three times over this request",
                    ) from None
                time.sleep(_PAUSE)
            except (OSError, frames.WireError) as error:
                raise self._timed_out(str(error)) from None
        try:
            reply = frames.decode_reply(body)
        except frames.WireError as error:
            raise self._timed_out(str(error)) from None
        if isinstance(reply, int):
            code = reply if reply in CATALOGUE else _FAILED
            raise SiteError(code, f"{request.kind}: must be served by the worker, got FE-{reply}")
        return reply

    def _once(self, parts: list[bytes], until: float) -> bytearray:
        with sockets.connect(self.path, max(until - time.monotonic(), 1e-3)) as connection:
            try:
                frames.send(connection, parts, until)
            except ConnectionError:
                # A worker may refuse a request before it has read all of it.
                return frames.receive(connection, frames.MAX_FRAME, until)
            try:
                return frames.receive(connection, frames.MAX_FRAME, until)
            except EOFError as error:
                # One that closes without having read the request resets the connection instead.
                raise _DiedError(str(error)) from None

    def _timed_out(self, got: str) -> SiteError:
        return SiteError(_TIMED_OUT, f"{self.path}: must answer, got {got}")


def deadline_of_environment() -> float:
    """Seconds to wait for a reply, from the launcher's environment variable, else 3600."""
    try:
        seconds = float(os.environ.get(DEADLINE_VARIABLE, ""))
    except ValueError:
        return DEFAULT_DEADLINE
    return seconds if math.isfinite(seconds) and seconds > 0 else DEFAULT_DEADLINE
