"""The servers that edge.py compares: how each is installed, configured and started.

Peers have environments of their own below .bench, made with pip from the configured index and kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import edge_model
from flower_side import free_port

HERE: Final = Path(__file__).resolve().parent
ENVIRONMENTS: Final = HERE.parent / ".bench"
PEERS: Final = HERE / "edge_peers"
BIN: Final = Path(sys.executable).parent
INSTALL_WITHIN: Final = 1200.0

#: Each peer's own packages. MLServer 1.7.1 takes any uvloop, but its workers die with 0.22 and later.
PINNED: Final = {
    "mlserver": ("mlserver==1.7.1", "uvloop==0.21.0"),
    "litserve": ("litserve==0.2.19",),
}
#: What does the work is of our version everywhere.
ALIKE: Final = ("onnxruntime", "numpy")

Command = Callable[[Path, int], list[str]]


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: in the table.
        protocol: of edge_client.py.
        command: from the folder of edge_model.py and a free port, what to start; None where there is no server.
        environment: of the peer, below ``.bench``; empty for our own.
        clients: how many at once, each a measurement.
        extra: environment variables.
    """

    name: str
    protocol: str
    command: Command | None = None
    environment: str = ""
    clients: tuple[int, ...] = (1, 4)
    extra: Mapping[str, str] = field(default_factory=dict)


def _ours(folder: Path, port: int) -> list[str]:
    bundle, trusted = folder / "model.fedge", folder / "key.pub"
    command = [str(BIN / "fedge-edge"), "serve", str(bundle), "--trust", str(trusted)]
    return [*command, "--listen", f"127.0.0.1:{port}", "--threads", "1"]


def _echo(folder: Path, port: int) -> list[str]:
    return [sys.executable, "-P", str(PEERS / "echo.py"), str(port), str(folder / "response.bin")]


def _mlserver(workers: int) -> Command:
    def command(folder: Path, port: int) -> list[str]:
        own = folder / f"mlserver-{workers}"
        own.mkdir(exist_ok=True)
        # Everything that costs and is not asked for is off: access log, metrics, cache, batching that waits.
        settings = {
            "host": "127.0.0.1",
            "grpc_port": port,
            "http_port": free_port(),
            "metrics_endpoint": None,
            "debug": False,
            "cache_enabled": False,
            "parallel_workers": workers,
        }
        model = {
            "name": edge_model.NAME,
            "implementation": "mlserver_model.OnnxModel",
            "parameters": {"uri": str(folder / "model.onnx")},
        }
        (own / "settings.json").write_text(json.dumps(settings))
        (own / "model-settings.json").write_text(json.dumps(model))
        for name in ("mlserver_model.py", "session.py"):
            shutil.copyfile(PEERS / name, own / name)
        return [str(ENVIRONMENTS / "mlserver" / "bin" / "mlserver"), "start", str(own)]

    return command


def _litserve(folder: Path, port: int) -> list[str]:
    python = ENVIRONMENTS / "litserve" / "bin" / "python"
    return [str(python), str(PEERS / "litserve_server.py"), str(port), str(folder / "model.onnx")]


BARE: Final = "bare onnxruntime"
ECHO: Final = "gRPC echo"
OURS: Final = "fedge-edge serve"
MLSERVER: Final = ("MLServer, no worker", "MLServer, 1 worker", "MLServer, 2 workers")
LITSERVE: Final = "LitServe (HTTP)"

CONTENDERS: Final = (
    Contender(BARE, "inprocess", clients=(1,)),
    Contender(ECHO, "kserve", _echo),
    Contender(OURS, "kserve", _ours),
    Contender(MLSERVER[0], "kserve", _mlserver(0), "mlserver"),
    Contender(MLSERVER[1], "kserve", _mlserver(1), "mlserver"),
    # Ours runs on as many cores as there are, and so may it.
    Contender(MLSERVER[2], "kserve", _mlserver(2), "mlserver"),
    Contender(LITSERVE, "litserve", _litserve, "litserve"),
)


def start(contender: Contender, folder: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a contender's server in a session of its own, its output appended to ``log``."""
    assert contender.command is not None
    with log.open("ab") as output:
        return subprocess.Popen(
            contender.command(folder, port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=environment() | contender.extra,
            start_new_session=True,
        )


def environment() -> dict[str, str]:
    """For every process that is started: no telemetry, one thread, no proxy on loopback."""
    return os.environ | {
        "ORT_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "*",
        "no_proxy": "*",
        "GRPC_VERBOSITY": "ERROR",
    }


def requirements(peer: str) -> list[str]:
    """Packages to install into a peer's environment."""
    return [*PINNED[peer], *(f"{name}=={version(name)}" for name in ALIKE)]


def install(peer: str, root: Path = ENVIRONMENTS) -> Path:
    """Make a peer's environment, or leave it where it is complete.

    Returns:
        Its folder.

    Raises:
        RuntimeError: pip failed; the message ends with what it said.
    """
    folder = root / peer
    mark, listed = folder / "installed", "\n".join(requirements(peer)) + "\n"
    if mark.is_file() and mark.read_text() == listed:
        return folder
    root.mkdir(exist_ok=True)
    # What is left of an installation that did not end cannot be trusted.
    shutil.rmtree(folder, ignore_errors=True)
    _run("venv", [sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    _run("pip", [*pip, "-q", *requirements(peer)])
    mark.write_text(listed)
    return folder


def versions(peer: str) -> dict[str, Any]:
    """Versions in a peer's environment of what matters to speed."""
    names = [peer, *ALIKE, "grpcio", "protobuf", "uvicorn", "fastapi", "uvloop"]
    code = (
        "import json, sys\nfrom importlib.metadata import distributions\n"
        "found = {d.metadata['Name'].lower(): d.version for d in distributions()}\n"
        "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    python = str(ENVIRONMENTS / peer / "bin" / "python")
    by_name: dict[str, Any] = json.loads(_run("python", [python, "-c", code, *names]))
    return by_name


def _run(program: str, command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=INSTALL_WITHIN
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{program}: must end within {INSTALL_WITHIN:g} s") from None
    if done.returncode:
        raise RuntimeError(f"{program}: failed\n{(done.stderr or done.stdout)[-3000:]}")
    return done.stdout
