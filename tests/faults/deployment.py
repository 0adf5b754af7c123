"""A server and its sites as an operator starts them, on loopback: real daemons, one process each.

with Deployment(folder) as deployment:
    deployment.admit("near")
    deployment.admit("far", dial=proxy.port)
    deployment.start("server", "near", "far")
    run = deployment.submit(config)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from fedge.client.deployment import operations
from fedge.server.runs.directory import state_of
from fedge.shared.daemon import home as homes
from fedge.shared.flower import app_bundle

FEDGE = [
    sys.executable,
    "-c",
    "import sys; from fedge.shared.cli.main import main; sys.exit(main())",
]
#: Seconds without a word that nobody has to bear, and within which a lost host is told.
SILENCE, LOST = 120.0, 75.0
#: How much slower than an idle one a machine may be before a test gives up.
PATIENCE = 4


@cache
def _bundle() -> str:
    """What a site approves; Flower's command that builds it takes as long as a site's other preparations."""
    return app_bundle.sha256()


class Deployment:
    """A server, and sites that may reach it by another address than its own.

    Args:
        folder: takes every home; made where missing.
        path: folders of further packages, for tasks that are not fedge's own.
    """

    def __init__(self, folder: Path, path: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, homes.free_port()
        self.server = folder / "server"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        before = os.environ.get("PYTHONPATH", "")
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (path, before))),
        }
        self.fedge("server", "init", "--home", self.server, "--address", f"127.0.0.1:{self.port}")

    def fedge(self, *words: str | Path) -> str:
        """Run one command of fedge; what it printed."""
        command = [*FEDGE, *map(str, words)]
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE * 120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def admit(self, site: str, dial: int | None = None, task: str = "breast-cancer") -> None:
        """Make a site's home and let it in; it dials the port ``dial`` where given."""
        home, ca = self.folder / site, self.server / "ca" / "ca.crt"
        address = f"127.0.0.1:{dial or self.port}"
        operations.init(home, site, task=task, server=address, ca=ca, bundle=_bundle())
        policy = home / "policy.toml"
        # A round without the others has a cohort of one, which a site refuses unless told otherwise.
        text = policy.read_text(encoding="utf-8")
        policy.write_text(text.replace("min-cohort = 2", "min-cohort = 1"), encoding="utf-8")
        self.fedge("server", "admit", site, home / "site.pub", "--home", self.server)

    def start(self, *names: str) -> None:
        """Start the daemon of "server" or of sites."""
        for name in names:
            kind = "server" if name == "server" else "site"
            command = [*FEDGE, kind, "start", "--home", str(self.folder / name)]
            with (self.folder / f"{name}.log").open("ab") as log:
                self.daemons[name] = subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log
                )

    def submit(self, text: str) -> Path:
        """Submit a configuration; the run's directory."""
        config = self.folder / "config.toml"
        config.write_text(text, encoding="utf-8")
        return (
            self.server
            / "runs"
            / self.fedge("server", "submit", config, "--home", self.server).strip()
        )

    def pids(self, name: str) -> dict[str, int]:
        """Process ids of a daemon and of what it has started, by name."""
        found: Mapping[str, Any] = homes.status(self.folder / name) or {}
        return {process: pid for process, pid, _ in homes.processes(found)}

    def kill_host(self, name: str) -> float:
        """SIGKILL for a daemon and all its processes, as when the power fails; when that was."""
        victims = self.pids(name)
        daemon = self.daemons.pop(name)
        daemon.kill()
        for pid in victims.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()
        return time.time()

    def wait(self, true: Callable[[], Any], seconds: float, what: str) -> float:
        """Wait until something is true; the seconds that it took.

        Args:
            true: asked every .1 s.
            seconds: enough where the machine has nothing else to do; ``PATIENCE`` times that is waited.
            what: is waited for.

        Raises:
            TimeoutError: it did not come, with the ends of all logs.
        """
        started = time.monotonic()
        while not true():
            if time.monotonic() - started > PATIENCE * seconds:
                raise TimeoutError(f"{what}: not within {seconds:g} s\n{self.tails()}")
            time.sleep(0.1)
        return time.monotonic() - started

    def tails(self) -> str:
        """The ends of all logs."""
        logs = sorted(self.folder.rglob("*.log"))
        return "\n".join(
            f"== {log.relative_to(self.folder)}\n"
            + "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
            for log in logs
        )

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End whatever runs, sites first."""
        for name in sorted(self.daemons, key=lambda name: name == "server"):
            daemon = self.daemons[name]
            daemon.terminate()
            try:
                daemon.wait(PATIENCE * 30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


class Told:
    """What a run's files tell so far.

    Args:
        run: its directory.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.since = run, time.time()

    def events(self, kind: str = "", site: str = "") -> list[dict[str, Any]]:
        """Of events.jsonl, those of a kind and a site where given; "at" as seconds."""
        found = _lines(self.run / "events.jsonl")
        for event in found:
            event["at"] = datetime.fromisoformat(event["at"]).timestamp()
        return [
            e
            for e in found
            if (not kind or e["event"] == kind) and (not site or e.get("site") == site)
        ]

    def rounds(self) -> list[dict[str, Any]]:
        """Of rounds.jsonl."""
        return _lines(self.run / "rounds.jsonl")

    def refused(self, line: Mapping[str, Any], site: str) -> list[dict[str, Any]]:
        """What a round's line says against a site."""
        return [r for r in line["rejected"] if r["site"] == site]

    def over(self) -> bool:
        """Whether the run has ended, one way or the other."""
        return state_of(self.run) != "unfinished"

    def state(self) -> str:
        """As ``fedge server runs`` shows it."""
        return state_of(self.run)

    def longest_silence(self) -> float:
        """Longest time without an event, from the submission to the end or to now, in seconds."""
        told = [self.since, *(event["at"] for event in self.events())]
        end = told[-1] if self.over() else time.time()
        return max(b - a for a, b in zip(told, [*told[1:], end], strict=True))


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]
