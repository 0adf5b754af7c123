"""The server's daemon: supervises Flower's SuperLink, its SuperExec, the TLS reverse proxy and the runs.

The SuperLink holds its state in a SQLite file and runs in process isolation, so it may die and come back while a run
goes on. What Flower loses, the scheduler restores from the journals.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from fedge.server.deployment import certificates, reverse_proxy, server_config, site_registry
from fedge.server.deployment.flower_control import (
    CONNECTION,
    Control,
    flower_environment,
    write_connection,
)
from fedge.server.deployment.run_scheduler import RunScheduler
from fedge.shared.daemon import home as homes
from fedge.shared.daemon import launcher
from fedge.shared.daemon.process import Program, preload, script
from fedge.shared.daemon.supervisor import Service, Supervisor
from fedge.shared.errors import DeployError, FedgeError
from fedge.shared.files import write_atomically
from fedge.shared.flower import app_bundle

_log = logging.getLogger(__name__)

#: Seconds between two reads of the site registry, and of the sites' connection state.
REGISTRY_EVERY, NODES_EVERY = 1.0, 20.0
#: Seconds after which a key that Flower did not accept is registered again.
RETRY_AFTER = 70.0
#: Consecutive failures of the SuperLink after which its database is taken to be the cause.
MAX_FAILURES = 4


def run(home: Path, *, fork_server: Path | None = None) -> int:
    """Run the daemon until SIGTERM.

    Args:
        home: as ``fedge server init`` made it.
        fork_server: socket of a process that forks coordinators, where there is one.

    Returns:
        The exit status: 0 after SIGTERM.

    Raises:
        DeployError: 901, not a home; 902, in use; 904, an address is taken; 907, the certificate is not usable;
            909 or 910, the reverse proxy is missing or refuses its configuration.
    """
    home = home.absolute()
    settings = server_config.load(home)
    homes.log_to_stderr()
    with homes.lock(home):
        # Processes that a killed daemon left behind get time to end and to free its port.
        homes.clear(home)
        daemon = ServerDaemon(home, settings, fork_server)
        daemon.supervisor.run()
    return 0 if daemon.supervisor.ended_by in (0, signal.SIGTERM) else 130


class ServerDaemon:
    """A server's processes and runs.

    Args:
        home: absolute.
        settings: its server.toml.
        fork_server: as ``run``.

    Raises:
        DeployError: as ``run``.
    """

    def __init__(
        self, home: Path, settings: server_config.ServerFile, fork_server: Path | None = None
    ) -> None:
        preload(("flwr.cli.app", "flwr.supercore.cli", "flwr.superlink.cli", "httpcore"))
        self._home, self._server = home, settings.server
        self._days = certificates.check(
            home, datetime.now(UTC), host=homes.split_address(settings.server.address)[0]
        )
        if warning := certificates.warning(self._days):
            _log.warning("%s", warning)
        for where in {settings.server.listen, f"127.0.0.1:{settings.server.port}"}:
            host, port = homes.split_address(where)
            if homes.answers("127.0.0.1" if host == "0.0.0.0" else host, port):  # noqa: S104
                raise DeployError(
                    904, f"{where}: must be free, got another process that listens there"
                )
        self.supervisor = Supervisor(home)
        self.supervisor.facts |= {"address": self._server.address, "certificate_days": self._days}
        self._secret = home / "superexec.secret"
        homes.write_secret(self._secret)
        self._environment = flower_environment(home)
        folder = launcher.install(self.supervisor, ["flwr-serverapp"], self._launch)
        self._environment["PATH"] = launcher.path_with(folder)
        write_connection(home / "flower", self._server.port, certificates.authority_path(home))
        app_bundle.write(home / "app")
        (home / "runs").mkdir(exist_ok=True)
        self._control = Control(self.supervisor, self._environment)
        # Flower's id of each site's node, which Flower gives only once, when the key is registered.
        self._nodes = _read_nodes(home / "nodes.json")
        self.supervisor.facts["registered"] = sorted(self._nodes)
        self._retry_at: dict[str, float] = {}
        self._reset_due = not (home / "superlink.db").exists() and bool(self._nodes)
        self._next_sync = self._next_nodes = 0.0
        self._runs = RunScheduler(
            home, self.supervisor, self._control, self._environment, fork_server=fork_server
        )
        self._keep()

    def _keep(self) -> None:
        self.supervisor.add(
            Service(
                "superlink",
                self._superlink,
                ready=lambda: homes.answers("127.0.0.1", self._server.port),
            )
        )
        self.supervisor.add(Service("superexec", self._superexec, after=("superlink",)))
        if self._server.front == "nginx":
            listen = homes.split_address(self._server.listen)
            reverse_proxy.write(self._home, listen, f"127.0.0.1:{self._server.port}")
            reverse_proxy.check(self._home)
            command = tuple(reverse_proxy.command(self._home))
            log = self.supervisor.log_of("front")
            self.supervisor.add(
                Service(
                    "front",
                    lambda: Program("fedge front", log, command=command),
                    after=("superlink",),
                )
            )
        self.supervisor.ticks += [self._tick]

    def _superlink(self) -> Program:
        if self._reset_due or self.supervisor.services["superlink"].failures >= MAX_FAILURES:
            self._reset_database()
        # Without a reverse proxy the SuperLink itself accepts the sites; server_config allows that on loopback only.
        host = "127.0.0.1"
        if self._server.front == "none":
            host = homes.split_address(self._server.listen)[0]
        arguments = [
            "--ssl-certfile", str(certificates.certificate_path(self._home)),
            "--ssl-keyfile", str(certificates.key_path(self._home)),
            "--ssl-ca-certfile", str(certificates.authority_path(self._home)),
            "--enable-supernode-auth",
            "--database", str(self._home / "superlink.db"),
            "--isolation", "process",
            "--superexec-auth-secret-file", str(self._secret),
            "--disable-runtime-dependency-installation",
            "--host", host,
            "--port", str(self._server.port),
        ]  # fmt: skip
        return self._flower("flower-superlink", arguments)

    def _superexec(self) -> Program:
        arguments = [
            "--runtime-api-address", f"127.0.0.1:{self._server.port}",
            "--root-certificates", str(certificates.authority_path(self._home)),
            "--superexec-auth-secret-file", str(self._secret),
            "--parent-pid", str(os.getpid()),
        ]  # fmt: skip
        return self._flower("flower-superexec", arguments)

    def _flower(self, name: str, arguments: list[str]) -> Program:
        return Program(
            " ".join([name, *arguments]),
            self.supervisor.log_of(name.removeprefix("flower-")),
            function=script(name, arguments),
            environment=self._environment,
        )

    def _launch(self, _name: str, arguments: list[str]) -> None:
        self._runs.launch(arguments)

    def _tick(self) -> None:
        ready = all(self.supervisor.services[name].is_ready for name in ("superlink", "superexec"))
        now = time.monotonic()
        if ready and now >= self._next_sync:
            self._next_sync = now + REGISTRY_EVERY
            self._sync_registry()
        if ready and now >= self._next_nodes and self._control.idle:
            self._next_nodes = now + NODES_EVERY
            self._control.call(["supernode", "list", CONNECTION], self._take_nodes)
        self._runs.tick(open_for_runs=ready)

    def _sync_registry(self) -> None:
        """Make Flower's list of keys equal to the site registry; an old key is removed before its new one is added."""
        try:
            keys = site_registry.site_keys(self._home)
        except FedgeError as error:
            self.supervisor.facts["roster"] = str(error)
            return
        self.supervisor.facts.pop("roster", None)
        digests = {n: hashlib.sha256(k.read_bytes()).hexdigest() for n, k in keys.items()}
        now = time.monotonic()
        for name, node in list(self._nodes.items()):
            if node["key"] != digests.get(name) and self._may_call(name, now):
                command = ["supernode", "unregister", node["node"], CONNECTION]
                self._control.call(command, partial(self._unregistered, name))
        for name, key in keys.items():
            if name not in self._nodes and self._may_call(name, now):
                command = ["supernode", "register", str(key), CONNECTION, "--name", name]
                self._control.call(command, partial(self._registered, name, digests[name]))

    def _may_call(self, name: str, now: float) -> bool:
        """Whether Flower may be called for a site: one call at a time, and after a failure a pause."""
        if now < self._retry_at.get(name, 0.0):
            return False
        self._retry_at[name] = now + RETRY_AFTER
        return True

    def _registered(self, name: str, key: str, answer: dict[str, Any] | None, output: str) -> None:
        if answer is not None:
            self._nodes[name] = {"node": str(answer.get("node-id")), "key": key}
            self._write_nodes()
            self._retry_at.pop(name, None)
            self._next_nodes = 0.0
        elif "in use" in output:
            # Flower has the key but does not give its node, and never accepts an expelled key again: its
            # database is reset. Nothing durable is in it: registry and journals are ours.
            _log.warning("site %s: Flower's database is reset for its key", name)
            self._reset_due = True
            self.supervisor.kill(self.supervisor.services["superlink"].pid)

    def _unregistered(self, name: str, answer: dict[str, Any] | None, output: str) -> None:
        if answer is not None or "not found" in output.lower():
            self._nodes.pop(name, None)
            self._write_nodes()
            self._retry_at.pop(name, None)

    def _reset_database(self) -> None:
        """Put Flower's database aside; keys are registered again, runs go on from their journals."""
        for path in self._home.glob("superlink.db*"):
            if not path.name.endswith(".old"):
                path.replace(path.with_name(path.name + ".old"))
        self._nodes, self._retry_at, self._reset_due = {}, {}, False
        self._write_nodes()

    def _write_nodes(self) -> None:
        write_atomically(self._home / "nodes.json", json.dumps(self._nodes).encode())
        self.supervisor.facts["registered"] = sorted(self._nodes)

    def _take_nodes(self, answer: dict[str, Any] | None, _output: str) -> None:
        if answer is None:
            return
        states = {str(node.get("node-id")): node for node in answer.get("nodes") or ()}
        self.supervisor.facts["sites"] = {
            name: {
                "state": states.get(number, {}).get("status", "unknown"),
                "since": states.get(number, {}).get("online-at"),
            }
            for name, number in sorted((n, node["node"]) for n, node in self._nodes.items())
        }


def _read_nodes(path: Path) -> dict[str, dict[str, str]]:
    try:
        nodes = json.loads(path.read_text(encoding="utf-8"))
        return {str(n): {"node": str(s["node"]), "key": str(s["key"])} for n, s in nodes.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
