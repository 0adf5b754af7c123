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
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedge.shared.daemon import process
from fedge.shared.errors import DeployError

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
        descriptor = os.open(home / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DeployError(901, f"{home}: must be a home, got {error.strerror}") from None
    try:
        _lock(descriptor, home)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, home: Path) -> None:
    # Somebody who only looks holds the lock for a moment too.
    deadline = time.monotonic() + 1.0
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise DeployError(902, f"{home}: must be free, got a running daemon") from None
        time.sleep(0.02)


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
    """What the daemon last said of itself, None where it never did."""
    try:
        with (home / "status.json").open("rb") as file:
            found = json.loads(file.read(MAX_STATUS))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def processes(found: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Name, pid and birth of every process that a status names, the daemon first; none before the machine's start."""
    if found.get("boot") != process.boot():
        return []
    entries = [("daemon", found)]
    entries += list((found.get("services") or {}).items())
    entries += [(str(task.get("name")), task) for task in found.get("tasks") or ()]
    return [
        (name, entry["pid"], entry["born"])
        for name, entry in entries
        if isinstance(entry.get("pid"), int) and entry["pid"] and isinstance(entry.get("born"), int)
    ]


def end(home: Path, grace: float = 15.0) -> int:
    """End the daemon of a home and whatever of it is left, never another process that has its number now.

    Returns:
        How many processes were ended.
    """
    found = status(home) or {}
    ended = 0
    for _, pid, born in processes(found) + processes(status(home) or {}):
        if process.birth(pid) == born:
            process.end(pid, born, grace)
            ended += 1
    return ended


def clear(home: Path) -> None:
    """End what a daemon that was killed has left, and forget what it last said: it is true no more."""
    end(home)
    (home / "status.json").unlink(missing_ok=True)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now, nor gets by itself: below those that the system gives to whoever dials.

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
    """Whether somebody accepts TCP connections there."""
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
