"""Calls to Flower's SuperLink with Flower's own command ``flwr``: one after the other, each in a fork.

Its Control API knows no login, so the SuperLink listens on a loopback address only.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fedge.shared.daemon.process import Program, script
from fedge.shared.daemon.supervisor import Supervisor

_log = logging.getLogger(__name__)

#: Seconds that a call may take.
DEADLINE = 60.0
#: Name of the connection in Flower's config.toml.
CONNECTION = "local"
#: Largest answer that is read, in bytes.
MAX_ANSWER = 16 * 2**20

#: Called with the JSON answer of a call, None where it failed, and with its other output as text.
Done: TypeAlias = Callable[[dict[str, Any] | None, str], None]


def write_connection(flower_home: Path, port: int, ca: Path) -> None:
    """Write Flower's config.toml, which names the SuperLink of this machine."""
    flower_home.mkdir(parents=True, exist_ok=True)
    text = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\nroot-certificates = {json.dumps(str(ca))}\n'
    )
    (flower_home / "config.toml").write_text(text, encoding="utf-8")


class Control:
    """A queue of calls.

    Args:
        supervisor: of the daemon.
        environment: of Flower's commands.
    """

    def __init__(self, supervisor: Supervisor, environment: Mapping[str, str]) -> None:
        self._supervisor, self._environment = supervisor, environment
        self._queue: deque[tuple[list[str], Done]] = deque()
        self._busy = False

    @property
    def idle(self) -> bool:
        """Whether no call is running or queued."""
        return not self._busy and not self._queue

    def call(self, arguments: Sequence[str], done: Done, *, first: bool = False) -> None:
        """Queue a call.

        Args:
            arguments: of ``flwr``, for example ``["supernode", "list", CONNECTION]``.
            done: called with the result.
            first: whether it goes before all queued calls.
        """
        entry = ([*arguments, "--format", "json"], done)
        if first:
            self._queue.appendleft(entry)
        else:
            self._queue.append(entry)
        self._next()

    def _next(self) -> None:
        if self._busy or not self._queue:
            return
        self._busy = True
        arguments, done = self._queue.popleft()
        output = self._supervisor.log_of("control")
        output.unlink(missing_ok=True)

        def on_exit(status: int) -> None:
            self._busy = False
            text = (
                output.read_bytes()[:MAX_ANSWER].decode(errors="replace") if output.exists() else ""
            )
            answer = _answer(text)
            if status or answer is None or answer.get("success") is False:
                message = " ".join(text.split())[-300:]
                _log.warning("flwr %s failed: %s", " ".join(arguments[:2]), message)
                done(None, message)
            else:
                done(answer, "")
            self._next()

        program = Program(
            "flwr " + " ".join(arguments),
            output,
            function=script("flwr", arguments),
            environment={**self._environment, "NO_COLOR": "1", "COLUMNS": "200"},
        )
        self._supervisor.task("flwr", program, on_exit, DEADLINE)


def _answer(text: str) -> dict[str, Any] | None:
    """The JSON object that a call printed, between or after log lines."""
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            start = text.find("{", start + 1)
            continue
        except RecursionError:  # nested too deeply to be one of Flower's
            return None
        return value if isinstance(value, dict) else None
    return None


def flower_environment(home: Path) -> dict[str, str]:
    """The environment of a server's Flower processes.

    Args:
        home: of the server.
    """
    return {
        "FLWR_HOME": str(home / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1",
        "FEDGE_RUNS": str(home / "runs"),
        "FEDGE_NODES": str(home / "nodes.json"),
        "PATH": os.environ.get("PATH", os.defpath),
    }
