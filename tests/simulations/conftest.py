"""``fedge`` as a process of its own: started afresh, or forked from one that has imported what it needs."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedge.shared.failpoints import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
FEDGE = [
    sys.executable,
    "-c",
    "import sys; from fedge.shared.cli.main import main; sys.exit(main())",
]
#: Seconds that a command has; a process to fork from, for its imports; and the same to end.
COMMAND, IMPORTS, ENDING = 300.0, 300.0, 60.0

#: What a run imports that takes longer than to fork.
MODULES = (
    "fedge.simulations.commands.simulate",
    "fedge.simulations.engine",
    "fedge.simulations.terminal.progress",
    "fedge.shared.tasks.breast_cancer",
    "fedge.shared.tasks.digits",
)

Fedge = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fresh() -> Fedge:
    """Runs a command in a process that starts from nothing."""

    def run(*words: str | Path, fail_point: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*FEDGE, *map(str, words)],
            env={**os.environ, VARIABLE: fail_point},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND,
            check=False,
        )

    return run


class Forked:
    """Runs commands in forks of one process; like ``fresh``, without the seconds of the imports.

    Args:
        folder: takes what a command prints.
        modules: imported before the first fork.
    """

    def __init__(self, folder: Path, modules: Sequence[str] = MODULES) -> None:
        self.folder, self.modules = folder, modules
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(
        self, *words: str | Path, fail_point: str = "", seconds: float = COMMAND
    ) -> subprocess.CompletedProcess[str]:
        """Run a command; what it printed, and its status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it was killed when its seconds were over.
            RuntimeError: the process that forks has ended.
        """
        argv = [str(word) for word in words]
        output = [self.folder / "stdout", self.folder / "stderr"]
        request = {
            "argv": argv,
            "environment": {**os.environ, VARIABLE: fail_point},
            "folder": str(Path.cwd()),
            "output": [str(path) for path in output],
            "seconds": seconds,
        }
        status = self._answer(request)
        if status is None:
            raise subprocess.TimeoutExpired(argv, seconds)
        return subprocess.CompletedProcess(argv, status, *(path.read_text() for path in output))

    def _answer(self, request: Mapping[str, Any]) -> int | None:
        if self.process is None:
            self._start()
        self._channel.settimeout(request["seconds"] + IMPORTS)
        try:
            self._channel.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(self._answers.readline())
        except BaseException as error:
            # An answer that comes later would be taken for the next command's.
            status = self.close()
            if isinstance(error, OSError | ValueError):
                raise RuntimeError(f"what forks: must answer, got its end, {status}") from error
            raise
        return int(answer["status"]) if answer["status"] is not None else None

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._answers = self._channel.makefile("rb")
        program = str(Path(__file__).with_name("forked.py"))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, program, str(theirs.fileno()), *self.modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def close(self) -> int | None:
        """Let the process end, with the command that it runs; its status."""
        if self.process is None:
            return None
        ending, self.process = self.process, None
        self._answers.close()
        self._channel.close()
        try:
            return ending.wait(ENDING)
        except subprocess.TimeoutExpired:
            ending.kill()
            return ending.wait()


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """Runs a command in a fork of a process that every later command of the session is forked from too."""
    running = Forked(tmp_path_factory.mktemp("forked"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def chaos() -> Iterator[ModuleType]:
    """benchmarks/chaos.py, with what it has of benchmarks/live.py."""
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "benchmarks" / "chaos.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["chaos"], sys.modules["live"]
    sys.path[:] = path
