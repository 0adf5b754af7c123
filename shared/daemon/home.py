"""A daemon's home on disk: its lock, and its state as others read it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedge.shared.daemon import process
from fedge.shared.errors import DeployError
from fedge.shared.files import take_lock

#: Longest status.json that is read, in bytes.
MAX_STATUS = 4 * 2**20


def log_to_stderr() -> None:
    """Have a daemon's log on standard error, with the time, from INFO on."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    for name in ("flwr", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def lock(home: Path) -> Iterator[None]:
    """Be the only daemon of a home; a lock of the kernel, so a crash leaves none behind.

    Raises:
        DeployError: 901, there is no such home; 902, another process holds it.
    """
    try:
        # ``held`` takes the lock for a moment too.
        held_lock = take_lock(home / "daemon.lock", timeout=1.0)
    except BlockingIOError:
        raise DeployError(902, f"{home}: must be free, got a running daemon") from None
    except OSError as error:
        raise DeployError(901, f"{home}: must be a home, got {error.strerror}") from None
    with held_lock:
        yield


def held(home: Path) -> bool:
    """Whether a daemon runs in this home."""
    try:
        descriptor = os.open(home / "daemon.lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def status(home: Path) -> dict[str, Any] | None:
    """The daemon's last status.json, None where it has written none."""
    try:
        with (home / "status.json").open("rb") as file:
            value = json.loads(file.read(MAX_STATUS))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def processes(state: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Name, pid and start time of every process of a status, the daemon first.

    Args:
        state: as ``status`` returns it; one from before the machine's last start has none.
    """
    if state.get("boot") != process.boot():
        return []
    entries = [("daemon", state)]
    entries += list((state.get("services") or {}).items())
    entries += [(str(task.get("name")), task) for task in state.get("tasks") or ()]
    return [
        (name, entry["pid"], entry["born"])
        for name, entry in entries
        if isinstance(entry.get("pid"), int) and entry["pid"] and isinstance(entry.get("born"), int)
    ]


def end(home: Path, grace: float = 15.0) -> int:
    """End the daemon of a home and its remaining processes, never another process that has reused a pid.

    Args:
        home: of the daemon.
        grace: seconds between SIGTERM and SIGKILL.

    Returns:
        How many processes were ended.
    """
    state = status(home) or {}
    ended = 0
    for _, pid, born in processes(state) + processes(status(home) or {}):
        if process.birth(pid) == born:
            process.end(pid, born, grace)
            ended += 1
    return ended


def clear(home: Path) -> None:
    """End the processes that a killed daemon has left, and remove its outdated status.json."""
    end(home)
    (home / "status.json").unlink(missing_ok=True)


def free_port(host: str = "127.0.0.1") -> int:
    """A free TCP port, below the range of ephemeral ports, so that no outgoing connection gets it.

    Raises:
        OSError: none of a thousand was free.
    """
    choose = random.SystemRandom()
    for _ in range(1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, choose.randrange(20_000, 32_000)))
            return int(probe.getsockname()[1])
    raise OSError(f"{host}: must have a free port between 20000 and 32000, got none")


def answers(host: str, port: int, timeout: float = 0.2) -> bool:
    """Whether a process accepts TCP connections at an address; ``timeout`` in seconds."""
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True
    except OSError:
        return False


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[v6]:port``.

    Raises:
        DeployError: 904.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise DeployError(904, f"address: must be host:port, got {address[:80]!r}")
    return host, int(port)


def write_secret(path: Path) -> None:
    """Write a new shared secret, 32 random bytes that only this user may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
