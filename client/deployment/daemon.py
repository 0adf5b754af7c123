"""The site's daemon: supervises Flower's SuperNode, its SuperExec and the resident worker, and restarts a stuck one.

Flower's node waits without limit for the reply of a client process: it is restarted when that process was killed, or
ended without a reply. When its connection fails in the TLS handshake it gives up, and its process stays without
reconnecting: that is detected in its log. On SIGTERM the node deregisters, so that it may reconnect at once; after a
SIGKILL Flower refuses it until its last heartbeat is a minute old, and the daemon retries.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fedge.client.deployment import flower_patches, server_probe, supernode_log
from fedge.client.settings.site_config import SiteFile, load
from fedge.shared.daemon import home as homes
from fedge.shared.daemon import launcher, sockets
from fedge.shared.daemon.process import Preloaded, Program, preload, script
from fedge.shared.daemon.supervisor import Service, Supervisor
from fedge.shared.errors import SiteError
from fedge.shared.flower.patches import CLIENT_APP, before_bundle

_log = logging.getLogger(__name__)

Part = Literal["both", "relay", "worker"]

#: Seconds between two polls of the SuperExec for work of its node. At 0.05 an idle site took 8 % of a core; four
#: sites that start poll some two hundred times before their first round ends.
POLL = "0.3"
#: Seconds between two checks of the server and its certificate.
LINK_EVERY = 30.0
#: Seconds in which the node must have taken a reply from a process that ended with an error.
REPLY_WITHIN = 5.0
#: Seconds between two checks of the node's log, and those that a process has to end after SIGTERM.
DISCONNECTED_EVERY, SHUTDOWN_WITHIN = 1.0, 5.0
#: Seconds that a client process has beyond the worker's deadline, and that a check of the server has in all.
APP_EXTRA, LINK_WITHIN = 120.0, 30.0
#: Name of the program that a fork server starts, with the home as argument.
WORKER = "worker"


def run(home: Path, part: Part = "both", *, fork_server: Path | None = None) -> int:
    """Run the daemon until SIGTERM.

    Args:
        home: as ``fedge site init`` made it.
        part: which processes run here; with two users relay and worker have a home each.
        fork_server: socket of a process that forks workers; without one a worker is a new interpreter.

    Returns:
        The exit status: 0 after SIGTERM.

    Raises:
        DeployError: 901, not a home; 902, in use.
        ConfigError: 201 to 204, the content of site.toml is not allowed.
    """
    home = home.absolute()
    site = load(home)
    homes.log_to_stderr()
    with homes.lock(home):
        # Processes left by a killed daemon get the time to end and to free their port.
        homes.clear(home)
        daemon = SiteDaemon(home, site, part, fork_server)
        daemon.supervisor.run()
    return 0 if daemon.supervisor.ended_by in (0, signal.SIGTERM) else 130


class SiteDaemon:
    """One site's processes.

    Args:
        home: absolute.
        site: its site.toml.
        part: "both", "relay" or "worker".
        fork_server: as ``run``.
    """

    def __init__(
        self, home: Path, site: SiteFile, part: Part, fork_server: Path | None = None
    ) -> None:
        self._home, self._site = home, site
        self._fork_server = fork_server
        self._socket = home / site.worker.socket
        self._port = 0
        self._node_log = supernode_log.SupernodeLog(home / "log" / "supernode.log")
        self._pending_restarts: list[tuple[float, int]] = []
        self._next_link = self._next_disconnected = 0.0
        self._shutdown_deadlines: dict[str, tuple[int, float]] = {}
        self.supervisor = Supervisor(home)
        self.supervisor.facts |= {"site": site.site.name, "server": site.server.address}
        if part != "relay":
            self._keep_worker()
        if part != "worker":
            self._keep_relay()

    def _keep_worker(self) -> None:
        command = (
            sys.executable,
            "-m",
            "fedge.client.worker.process",
            str(self._home),
            "--with-parent",
        )
        program = Program(
            f"fedge worker --home {self._home}",
            self.supervisor.log_of("worker"),
            command=command,
            preloaded=Preloaded(self._fork_server, WORKER, (str(self._home),))
            if self._fork_server
            else None,
        )
        self.supervisor.add(Service("worker", lambda: program, ready=self._worker_answers))

    def _keep_relay(self) -> None:
        # Only the relay's side knows Flower.
        preload(("flwr.supernode.cli", "flwr.supernode.main", "httpcore", "fedge.client.app"))
        self._secret = self._home / "superexec.secret"
        homes.write_secret(self._secret)
        self._environment = {
            "FLWR_HOME": str(self._home / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLL,
            "FEDGE_WORKER_SOCKET": str(self._socket),
            "FEDGE_WORKER_DEADLINE": str(self._site.worker.deadline),
        }
        folder = launcher.install(self.supervisor, ["flwr-clientapp"], self._launch)
        self._environment["PATH"] = launcher.path_with(folder)
        self.supervisor.add(
            Service("supernode", self._supernode, ready=self._connected, on_exit=self._node_ended)
        )
        self.supervisor.add(
            Service("superexec", self._superexec, after=("supernode",), on_exit=self._exec_ended)
        )
        self.supervisor.ticks += [
            self._watch_pending_restarts,
            self._restart_disconnected,
            self._watch_shutdown_deadlines,
            self._watch_link,
        ]

    def _supernode(self) -> Program:
        self._port = homes.free_port()
        log = self.supervisor.log_of("supernode")
        self._node_log = supernode_log.SupernodeLog(log)
        server = self._site.server
        arguments = [
            "--root-certificates", str(self._home / server.root_certificates),
            "--superlink", server.address,
            "--auth-supernode-private-key", str(self._home / "site.key"),
            "--node-config", f'site="{self._site.site.name}"',
            "--isolation", "process",
            "--superexec-auth-secret-file", str(self._secret),
            "--host", "127.0.0.1",
            "--port", str(self._port),
        ]  # fmt: skip
        return self._flower("flower-supernode", arguments, log, _node)

    def _superexec(self) -> Program:
        arguments = [
            "--runtime-api-address", f"127.0.0.1:{self._port}",
            "--insecure",
            "--superexec-auth-secret-file", str(self._secret),
            "--parent-pid", str(self.supervisor.services["supernode"].pid),
        ]  # fmt: skip
        return self._flower("flower-superexec", arguments, self.supervisor.log_of("superexec"))

    def _flower(
        self,
        name: str,
        arguments: list[str],
        log: Path,
        run: Callable[[str, list[str]], int | None] | None = None,
    ) -> Program:
        function = partial(run, name, arguments) if run else script(name, arguments)
        title = " ".join([name, *arguments])
        return Program(title, log, function=function, environment=self._environment)

    def _launch(self, name: str, arguments: list[str]) -> None:
        log = self.supervisor.log_of("supernode")
        size = log.stat().st_size if log.is_file() else 0
        program = Program(
            name,
            self.supervisor.log_of("clientapp"),
            function=partial(_client_app, name, arguments, self._socket),
            environment=self._environment,
        )
        self.supervisor.task(
            name,
            program,
            on_exit=lambda status: self._app_ended(status, size),
            deadline=self._site.worker.deadline + APP_EXTRA,
        )

    def _worker_answers(self) -> bool:
        try:
            sockets.connect(self._socket, 0.1).close()
        except OSError:
            return False
        return True

    def _connected(self) -> bool:
        ready = self._node_log.has_logged([supernode_log.CONNECTED])
        if ready:
            self.supervisor.facts["connected_since"] = round(time.time())
            self.supervisor.facts["problem"] = ""
        return ready

    def _node_ended(self, _status: int) -> None:
        self.supervisor.facts["connected_since"] = None
        if self._node_log.has_logged(supernode_log.UNKNOWN):
            # Also for up to a minute after a SIGKILL, while Flower still counts the former process as online.
            self.supervisor.facts["problem"] = (
                "FE-913 the server does not admit this key, or not yet again"
            )
        self._pending_restarts.clear()
        self._stop("superexec")
        for pid in self.supervisor.alive("flwr-clientapp"):
            self.supervisor.kill(pid)

    def _exec_ended(self, _status: int) -> None:
        if self.supervisor.services["supernode"].pid:
            # The node would wait without limit for a task that was taken and not started.
            self._stop("supernode")

    def _app_ended(self, status: int, log_size: int) -> None:
        if os.WIFSIGNALED(status):
            _log.error("flwr-clientapp was killed without a reply; its node is restarted")
            self._stop("supernode")
        elif os.WEXITSTATUS(status):
            self._pending_restarts.append((time.monotonic() + REPLY_WITHIN, log_size))

    def _watch_pending_restarts(self) -> None:
        """Restart the node if a process ended with an error and no reply or further message shows in the node's log."""
        now = time.monotonic()
        due = [size for deadline, size in self._pending_restarts if now > deadline]
        self._pending_restarts = [
            pending for pending in self._pending_restarts if now <= pending[0]
        ]
        log = self.supervisor.log_of("supernode")
        texts = [supernode_log.tail(log, size) for size in due]
        if any(not any(words in text for words in supernode_log.MOVES_ON) for text in texts):
            _log.error("flwr-clientapp ended without a reply; its node is restarted")
            self._stop("supernode")

    def _restart_disconnected(self) -> None:
        """Restart a node that has given up its connection."""
        now = time.monotonic()
        # While no node runs, the log still ends with the lines of the last one.
        if now < self._next_disconnected or not self.supervisor.services["supernode"].pid:
            return
        self._next_disconnected = now + DISCONNECTED_EVERY
        if "supernode" not in self._shutdown_deadlines and self._node_log.has_logged(
            supernode_log.DISCONNECTED
        ):
            _log.error("the node has given up the connection to the server and is restarted")
            self._stop("supernode")

    def _stop(self, name: str) -> None:
        """End a service by SIGTERM; ``_watch_shutdown_deadlines`` kills it if it does not end."""
        pid = self.supervisor.services[name].pid
        if pid and self._shutdown_deadlines.get(name, (0, 0.0))[0] != pid:
            self._shutdown_deadlines[name] = pid, time.monotonic() + SHUTDOWN_WITHIN
            self.supervisor.kill(pid, signal.SIGTERM)

    def _watch_shutdown_deadlines(self) -> None:
        """Kill services that have not ended by their shutdown deadline."""
        for name, (pid, until) in list(self._shutdown_deadlines.items()):
            if self.supervisor.services[name].pid != pid:
                del self._shutdown_deadlines[name]
            elif time.monotonic() > until:
                self.supervisor.kill(pid, signal.SIGKILL)

    def _watch_link(self) -> None:
        path = self._home / "link.json"
        if time.monotonic() < self._next_link or self.supervisor.alive("link"):
            return
        self._next_link = time.monotonic() + LINK_EVERY
        # The result of an earlier check must not be used if this one hangs.
        path.unlink(missing_ok=True)
        server = self._site.server
        check = partial(
            server_probe.write, server.address, self._home / server.root_certificates, path
        )

        def take(status: int) -> None:
            why = (
                f"not checked within {LINK_WITHIN:g} s"
                if os.WIFSIGNALED(status)
                else "see link.log"
            )
            link: Any = {
                "at": round(time.time()),
                "reachable": False,
                "days_left": None,
                "problem": f"FE-912 the server cannot be reached: {why}",
            }
            if status == 0:
                with suppress(OSError, ValueError):
                    link = json.loads(path.read_text(encoding="utf-8"))
            self.supervisor.facts["link"] = link

        program = Program("fedge link check", self.supervisor.log_of("link"), function=check)
        self.supervisor.task("link", program, on_exit=take, deadline=LINK_WITHIN)


def _node(name: str, arguments: list[str]) -> int | None:
    """Run ``flower-supernode`` in a fork: Flower's command, with shorter polling while a run is under way."""
    if not flower_patches.poll_while_busy():
        _log.warning("this release of Flower polls every 3 s, also during a run")
    return script(name, arguments)()


def _client_app(name: str, arguments: list[str], socket: Path) -> int | None:
    """Run ``flwr-clientapp`` in a fork: Flower's command, after a check that the bundle is approved."""
    from fedge.client.relay.worker_client import SocketLink

    def approve(content: bytes) -> None:
        sha256 = hashlib.sha256(content).hexdigest()
        os.environ["FEDGE_BUNDLE"] = sha256
        try:
            SocketLink(socket, deadline=60.0).permit(sha256)
        except SiteError as error:
            _log.error("bundle %s: %s", sha256, error)
            # The text of an exception goes to the server; the details stay in this log.
            raise SiteError(error.code, "refused by the site") from None

    before_bundle(CLIENT_APP, approve)
    return script(name, arguments)()
