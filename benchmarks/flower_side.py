"""A plain Flower deployment on loopback: SuperLink, SuperNodes and runs, as Flower's user has them.

Everything lies in one folder; every process has its own FLWR_HOME. Used by deployment.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

APP = Path(__file__).resolve().parent / "flower_baseline"
BIN = Path(sys.executable).parent
ONLINE_WITHIN = 90.0
RUN_WITHIN = 600.0
STOP_WITHIN = 30.0


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(home: Path) -> dict[str, str]:
    """For a Flower process: its own home, no telemetry, its child commands on PATH."""
    home.mkdir(parents=True, exist_ok=True)
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        # Four sites on a few cores: torch's threads would only wait for one another.
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def start(folder: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a Flower command in a session of its own, its output in ``folder/name.log``."""
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [str(BIN / arguments[0]), *arguments[1:]],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=environment(folder / f"{name}-home"),
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that ``start`` began, and what is left of its session."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_WITHIN)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Link:
    """A SuperLink that runs, as its operator sees it.

    Attributes:
        address: host:port.
        ca: certificate of its authority, PEM.
        folder: of logs and homes.
    """

    address: str
    ca: Path
    folder: Path

    def operate(self, *arguments: str, timeout: float = 60.0) -> Any:
        """Run a ``flwr`` command against this SuperLink.

        Returns:
            What it prints with ``--format json``.
        """
        home = self.folder / "operator-home"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "{self.address}"\n'
            f'root-certificates = "{self.ca}"\n'
        )
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments, "--format", "json"],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=environment(home),
            cwd=self.folder,
        )
        if done.returncode != 0:
            raise RuntimeError(f"flwr {arguments[0]} failed: {done.stdout}{done.stderr}")
        return json.loads(done.stdout[done.stdout.index("{") :])

    def online(self) -> int:
        """How many nodes are online."""
        nodes = self.operate("supernode", "list", "lab")["nodes"]
        return sum(node["status"] == "online" for node in nodes)


def wait_open(address: str, process: subprocess.Popen[bytes], within: float = 60.0) -> None:
    """Wait until a server that was started accepts connections."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + within
    while True:
        try:
            socket.create_connection((host, int(port)), 1.0).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"{address}: no answer") from None
        time.sleep(0.2)


def wait_online(link: Link, count: int, within: float = ONLINE_WITHIN) -> float:
    """Wait until ``count`` nodes are online; returns the seconds that it took."""
    begun = time.monotonic()
    while (online := link.online()) != count:
        if time.monotonic() - begun > within:
            raise TimeoutError(f"{online} of {count} nodes online after {within:.0f} s")
        time.sleep(0.5)
    return time.monotonic() - begun


def node_key(folder: Path, name: str) -> tuple[Path, Path]:
    """A new node key: the private and the public file."""
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    private.chmod(0o600)
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    return private, public


def start_node(
    link: Link, name: str, key: Path, address: str | None = None
) -> subprocess.Popen[bytes]:
    """Start a plain SuperNode, its ClientApps as child processes, as it does by default."""
    return start(
        link.folder,
        name,
        "flower-supernode",
        "--root-certificates",
        str(link.ca),
        "--superlink",
        address or link.address,
        "--auth-supernode-private-key",
        str(key),
        "--host",
        "127.0.0.1",
        "--port",
        str(free_port()),
    )


def run_baseline(link: Link, sites: int, rounds: int, evaluate: bool) -> list[float]:
    """Run the plain app and return each round's seconds."""
    times = link.folder / f"times-{time.time_ns()}"
    link.operate(
        "run",
        str(APP),
        "lab",
        "--run-config",
        f'num-rounds={rounds} sites={sites} evaluate={str(evaluate).lower()} times="{times}"',
    )
    begun = time.monotonic()
    while len(read_times(times)) <= rounds:
        if time.monotonic() - begun > RUN_WITHIN:
            raise TimeoutError(f"no {rounds} rounds within {RUN_WITHIN:.0f} s; see {link.folder}")
        time.sleep(0.5)
    ended = read_times(times)
    return [b - a for a, b in itertools.pairwise(ended)]


def read_times(path: Path) -> list[float]:
    """The times at which rounds 0, 1, ... ended, as the app wrote them, seconds."""
    if not path.exists():
        return []
    # A line that is still being written lacks its end.
    lines = path.read_text().splitlines(keepends=True)
    return [float(line.split()[1]) for line in lines if line.endswith("\n")]
