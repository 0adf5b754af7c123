"""A server and its sites as an operator starts them, on loopback, for tests: real daemons, one process each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fedge.shared.daemon import home as homes

FEDGE = [sys.executable, "-c", "import sys; from fedge.shared.cli import main; sys.exit(main())"]


def fedge(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one command of fedge."""
    done = subprocess.run(
        [*FEDGE, *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


class Deployment:
    """A server, and sites that may reach it by another address than its own.

    Args:
        folder: takes every home.
        sites: names.
        through: by site, the port to dial instead of the server's.
    """

    def __init__(self, folder: Path, sites: list[str], port: int | None = None) -> None:
        self.folder, self.sites = folder, sites
        self.port = port or homes.free_port()
        self.server = folder / "server"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        fedge("server", "init", "--home", self.server, "--address", f"127.0.0.1:{self.port}")

    def admit(self, site: str, dial: int | None = None, task: str = "breast-cancer") -> Path:
        """Make a site's home and let it in; it dials ``dial`` where given."""
        home = self.folder / site
        ca = self.server / "ca" / "ca.crt"
        address = f"127.0.0.1:{dial or self.port}"
        fedge("site", "init", site, "--home", home, "--task", task, "--server", address, "--ca", ca)
        fedge("server", "admit", site, home / "site.pub", "--home", self.server)
        return home

    def start(self, name: str, *more: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start the daemon of "server" or of a site."""
        kind = "server" if name == "server" else "site"
        command = [*FEDGE, kind, "start", "--home", str(self.folder / name), *more]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(command, stdout=log, stderr=log, **options)
        return self.daemons[name]

    def submit(self, text: str, *more: str) -> Path:
        """Submit a configuration; the run's directory."""
        config = self.folder / "config.toml"
        config.write_text(text, encoding="utf-8")
        done = fedge("server", "submit", config, "--home", self.server, *more)
        return self.server / "runs" / done.stdout.strip()

    def status(self, name: str) -> Mapping[str, Any]:
        """What a daemon says of itself."""
        return homes.status(self.folder / name) or {}

    def wait(self, true: Callable[[], Any], seconds: float, what: str) -> float:
        """Wait until something is true; the seconds that it took."""
        started = time.monotonic()
        while not true():
            spent = time.monotonic() - started
            assert spent < seconds, f"{what}: not within {seconds:g} s\n{self.tails()}"
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

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        """End a daemon; its exit status."""
        daemon = self.daemons.pop(name)
        if daemon.poll() is None:
            os.kill(daemon.pid, number)
        return daemon.wait(30)

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
            self.stop(name)


def events(run: Path) -> list[dict[str, Any]]:
    """What a run's events.jsonl tells so far."""
    path = run / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
