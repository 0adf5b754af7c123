"""The site's daemon: keeps Flower's SuperNode, its SuperExec and the resident worker, and knows when one is stuck.

Flower's node waits for ever on a reply that nobody will write: it is started again when the process that owed the
reply was killed, or ended without one. When its line fails in the TLS handshake it gives up, and its process stays
without ever calling again: that too is noticed, from its log. A SIGTERM lets the node say good-bye, so that it may
return at once; after a SIGKILL Flower refuses it until its last heartbeat is a minute old, and we keep trying.
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

#: Seconds between two questions of the SuperExec to its node for work. At 0.05 an idle site took 8 % of a core; four
#: sites that start ask some two hundred times before their first round ends.
POLL = "0.3"
#: Seconds between two looks at the server and its certificate.
LINK_EVERY = 30.0
#: Seconds in which the node must have taken a reply from a process that ended with an error.
TAKEN_WITHIN = 5.0
#: Seconds between two looks at the node's log, and those that a process has for its good-bye.
DEAF_EVERY, GOOD_BYE = 1.0, 5.0
#: Seconds that a client process has beyond the worker's deadline, and a look at the server in all.
APP_EXTRA, LINK_WITHIN = 120.0, 30.0
#: What a fork server is asked for, with the home.
WORKER = "worker"


def run(home: Path, part: Part = "both", *, fork_server: Path | None = None) -> int:
    """Run the daemon until SIGTERM.

    Args:
        home: as ``fedge site init`` made it.
        part: which half runs here; with two users each half has a home of its own.
        fork_server: socket of a process that forks workers; a worker is a new interpreter where there is none.

    Returns:
        The exit status: 0 after SIGTERM.

    Raises:
        DeployError: 901, not a home; 902, in use.
        ConfigError: 201 to 204, site.toml is not as it must be.
    """
    home = home.absolute()
    site = load(home)
    homes.log_to_stderr()
    with homes.lock(home):
        # What a daemon that was killed has left is given the time to end, and its port with it.
        homes.clear(home)
        daemon = SiteDaemon(home, site, part, fork_server)
        daemon.supervisor.run()
    return 0 if daemon.supervisor.ended_by in (0, signal.SIGTERM) else 130


class SiteDaemon:
    """One site's processes.

    Args:
        home: absolute.
        site: its site.toml.
        part: "both", or one half.
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
        self._owed: list[tuple[float, int]] = []
        self._next_link = self._next_deaf = 0.0
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
        ready = self._node_log.said([supernode_log.CONNECTED])
        if ready:
            self.supervisor.facts["connected_since"] = round(time.time())
            self.supervisor.facts["problem"] = ""
        return ready

    def _node_ended(self, _status: int) -> None:
        self.supervisor.facts["connected_since"] = None
        if self._node_log.said(supernode_log.UNKNOWN):
            # Also for up to a minute after a SIGKILL, while Flower still counts the former process as online.
            self.supervisor.facts["problem"] = (
                "FE-913 the server does not admit this key, or not yet again"
            )
        self._owed.clear()
        self._stop("superexec")
        for pid in self.supervisor.alive("flwr-clientapp"):
            self.supervisor.kill(pid)

    def _exec_ended(self, _status: int) -> None:
        if self.supervisor.services["supernode"].pid:
            # A task that it had taken and not started would be waited for for ever.
            self._stop("supernode")

    def _app_ended(self, status: int, log_size: int) -> None:
        if os.WIFSIGNALED(status):
            _log.error("flwr-clientapp was killed; its node waits in vain and is started again")
            self._stop("supernode")
        elif os.WEXITSTATUS(status):
            self._owed.append((time.monotonic() + TAKEN_WITHIN, log_size))

    def _watch_pending_restarts(self) -> None:
        """A process that ended with an error has usually answered; a node that neither sends nor takes is stuck."""
        now = time.monotonic()
        due = [size for deadline, size in self._owed if now > deadline]
        self._owed = [debt for debt in self._owed if now <= debt[0]]
        log = self.supervisor.log_of("supernode")
        said = [supernode_log.tail(log, size) for size in due]
        if any(not any(words in text for words in supernode_log.MOVES_ON) for text in said):
            _log.error("flwr-clientapp ended without an answer; its node is started again")
            self._stop("supernode")

    def _restart_disconnected(self) -> None:
        """A node that has given up its line is ended."""
        now = time.monotonic()
        # Between two nodes the log still ends with the words of the former.
        if now < self._next_deaf or not self.supervisor.services["supernode"].pid:
            return
        self._next_deaf = now + DEAF_EVERY
        if "supernode" not in self._shutdown_deadlines and self._node_log.said(
            supernode_log.DISCONNECTED
        ):
            _log.error("the node has given up the line to the server and is started again")
            self._stop("supernode")

    def _stop(self, name: str) -> None:
        """End a service; ``_watch_shutdown_deadlines`` sees to it that it does end."""
        pid = self.supervisor.services[name].pid
        if pid and self._shutdown_deadlines.get(name, (0, 0.0))[0] != pid:
            self._shutdown_deadlines[name] = pid, time.monotonic() + GOOD_BYE
            self.supervisor.kill(pid, signal.SIGTERM)

    def _watch_shutdown_deadlines(self) -> None:
        """A service whose good-bye hangs is ended by SIGKILL."""
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
        # What an earlier look found is no answer where this one hangs.
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
            found: Any = {
                "at": round(time.time()),
                "reachable": False,
                "days_left": None,
                "problem": f"FE-912 the server cannot be reached: {why}",
            }
            if status == 0:
                with suppress(OSError, ValueError):
                    found = json.loads(path.read_text(encoding="utf-8"))
            self.supervisor.facts["link"] = found

        program = Program("fedge link check", self.supervisor.log_of("link"), function=check)
        self.supervisor.task("link", program, on_exit=take, deadline=LINK_WITHIN)


def _node(name: str, arguments: list[str]) -> int | None:
    """What a fork runs for ``flower-supernode``: Flower's own command, more eager while a run is under way."""
    if not flower_patches.poll_while_busy():
        _log.warning("this release of Flower polls every 3 s, whatever is to be done")
    return script(name, arguments)()


def _client_app(name: str, arguments: list[str], socket: Path) -> int | None:
    """What a fork runs for ``flwr-clientapp``: Flower's own command, with our look at the bundle before it."""
    from fedge.client.relay.worker_client import SocketLink

    def approve(content: bytes) -> None:
        sha256 = hashlib.sha256(content).hexdigest()
        os.environ["FEDGE_BUNDLE"] = sha256
        try:
            SocketLink(socket, deadline=60.0).permit(sha256)
        except SiteError as error:
            _log.error("bundle %s: %s", sha256, error)
            # The text of an exception goes to the server; ours stays here.
            raise SiteError(error.code, "refused by the site") from None

    before_bundle(CLIENT_APP, approve)
    return script(name, arguments)()
