"""A federation of ``fedge up`` that runs, as tests and benchmarks watch it: its processes, its logs, its rounds."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedge.shared.daemon import home as homes
from fedge.shared.failpoints import VARIABLE

FEDGE = [
    sys.executable,
    "-c",
    "import sys; from fedge.shared.cli.main import main; sys.exit(main())",
]
#: How much slower than an idle one a machine may be before a wait is given up. No goal: those are held on an idle one.
WAIT_FACTOR = 4


class Live:
    """A federation that runs now.

    Args:
        config: configuration file.
        out: run directory.
        fail_point: for the first coordinator.

    """

    def __init__(self, config: Path, out: Path, fail_point: str = "", *more: str) -> None:
        self.out = out
        self.log = out.with_name(f"{out.name}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [*FEDGE, "up", "--config", str(config), "--out", str(out), *more]
        environment = {**os.environ, VARIABLE: fail_point}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def home(self, name: str) -> Path:
        """State directory of "server" or of a site."""
        return self.out / "server" if name == "server" else self.out / "sites" / name

    def pid(self, name: str, service: str) -> int:
        """Process id of a daemon's service or task, 0 where it does not run."""
        for task, pid, _ in homes.processes(homes.status(self.home(name)) or {}):
            if task == service:
                return pid
        return 0

    def host(self, name: str) -> list[int]:
        """All processes of a daemon, itself first."""
        return [pid for _, pid, _ in homes.processes(homes.status(self.home(name)) or {})]

    def text(self, name: str, log: str) -> str:
        """A log so far."""
        path = self.home(name) / "log" / f"{log}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def committed(self) -> int:
        """Rounds in rounds.jsonl."""
        path = self.out / "rounds.jsonl"
        return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0

    def wait(self, true: Callable[[], Any], seconds: float, event: str) -> float:
        """Wait until something is true; the seconds that it took.

        Args:
            true: the condition, polled every 20 ms.
            seconds: enough where the machine has nothing else to do; ``WAIT_FACTOR`` times that is waited.
            event: what is waited for, for messages.

        Raises:
            TimeoutError: it did not come.
        """
        started = time.monotonic()
        while not true():
            if time.monotonic() - started > WAIT_FACTOR * seconds:
                raise TimeoutError(f"{event}: not within {seconds:g} s\n{self.tail()}")
            if self.process.poll() is not None and not true():
                raise TimeoutError(
                    f"{event}: fedge up ended with {self.process.returncode}\n{self.tail()}"
                )
            time.sleep(0.02)
        return time.monotonic() - started

    def tail(self) -> str:
        """The end of the output of ``fedge up``."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:]

    def end(self, seconds: float = 60.0) -> None:
        """SIGTERM, and SIGKILL where that is not enough."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextmanager
def federation(config: Path, out: Path, fail_point: str = "", *more: str) -> Iterator[Live]:
    """A federation that ends with the block."""
    live = Live(config, out, fail_point, *more)
    try:
        yield live
    finally:
        live.end()


def reference(config: Path, out: Path) -> str:
    """SHA-256 of the weights that a simulation of the same configuration ends with."""
    command = [*FEDGE, "simulate", str(config), "--out", str(out), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=WAIT_FACTOR * 300)
    return sha256(out)


def sha256(out: Path) -> str:
    """SHA-256 of the final weights in a run directory, empty where there are none yet."""
    model = out / "model.safetensors"
    return hashlib.sha256(model.read_bytes()).hexdigest() if model.is_file() else ""
