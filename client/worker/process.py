"""The site's resident worker as a process: ``python -m fedge.client.worker.process HOME``.

It holds the data, the model, the device and the policy for as long as the site runs, and serves the relay
over a Unix socket. Its supervisor restarts it when it dies; exit status 75 requests a restart.
"""

from __future__ import annotations

import argparse
import grp
import logging
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from fedge.client.data import dataset as own_data
from fedge.client.data import npy_files
from fedge.client.data.dataset import SiteData
from fedge.client.secagg import trusted_roster
from fedge.client.secagg.session import Anchors
from fedge.client.secagg.trusted_roster import RosterFile
from fedge.client.settings import site_config
from fedge.client.settings.policy import PolicyFile
from fedge.client.settings.site_config import SiteFile
from fedge.client.training import device as devices
from fedge.client.worker.handlers import SiteWorker
from fedge.client.worker.socket_server import ROUND, RUN, Service
from fedge.shared.cli.command import guarded
from fedge.shared.daemon import sockets
from fedge.shared.daemon.process import die_with_parent, forbid_core_dumps
from fedge.shared.errors import ConfigError, DeployError, SiteError
from fedge.shared.files import take_lock
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.task import Task

# Run as a program its name would be __main__.
log = logging.getLogger("fedge.client.worker.process")

LOCK = "worker.lock"
_DRAIN_SECONDS = 2.0
_FORMAT = (
    "%(asctime)s %(levelname)s site=%(site)s run=%(run)s round=%(round)s %(name)s: %(message)s"
)


def main(home: Path, *, with_parent: bool = False) -> int:
    """Serve the worker of a home until SIGTERM or SIGINT.

    Args:
        home: holds ``site.toml`` and ``policy.toml``, and takes what outlives the process.
        with_parent: end when the parent dies.

    Returns:
        The exit status: 0 after a signal, 75 where a new process is needed.

    Raises:
        DeployError: 901, not a site's home; 902, another worker serves it; 904, the socket cannot be made.
        ConfigError: 201 to 204, site.toml or policy.toml is not allowed.
        DataError: 301 to 304, task or data.
        SiteError: 416, the data exceed the memory bound; 417, there is no such device.
        DeployError, ReleaseError: see ``_anchors``.
    """
    forbid_core_dumps()
    if with_parent:
        die_with_parent()
    with _lock(home):
        site = site_config.load(home)
        _log_to_stderr(site.site.name)
        policies = PolicyFile(home)
        allowed = policies.current()
        device = devices.choose(allowed.device)
        task = get_task(site.site.task)
        devices.bound(device, allowed.memory_gib, allowed.gpu_memory_fraction)
        try:
            data = _data(site, task)
            anchors = _anchors(site.site.name, home, policies)
            worker = SiteWorker(
                site.site.name,
                task,
                data,
                home.absolute(),
                device,
                anchors,
                lambda: policies.current().privacy,
            )
        except MemoryError:
            raise SiteError(
                416, "data: must be at most policy.memory-gib in memory, got more"
            ) from None
        if site.site.task not in allowed.tasks:
            log.warning("policy.toml: tasks must hold %s, or nothing is served", site.site.task)
        return _serve(site, worker, policies)


def _anchors(site: str, home: Path, policies: PolicyFile) -> Anchors | None:
    """The keys and roster that the site trusts in secure aggregation; None without a roster and without need of one.

    Raises:
        DeployError: 917 to 919, the roster is not usable, is older than one used before, or lacks this site's key.
        ReleaseError: 602, the site's key is not usable.
    """
    if (
        not (home / trusted_roster.FILE).exists()
        and not policies.current().secure_aggregation.required
    ):
        return None
    rosters = RosterFile(home)
    private = trusted_roster.own_key(home)
    trusted_roster.require_own(rosters.current(), site, private, datetime.now(UTC).date())
    return Anchors(
        site,
        private,
        rosters.current,
        lambda: policies.current().secure_aggregation.min_sites,
    )


def _data(site: SiteFile, task: Task) -> SiteData:
    if site.data.share is None:
        return own_data.own_examples(task, site.site.name, site.data)
    data = npy_files.read(site.data.share)
    own_data.require_task_data(task, data)
    return data


def _serve(site: SiteFile, worker: SiteWorker, policies: PolicyFile) -> int:
    statuses: list[int] = []
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    # A signal that comes just before the loop waits does not interrupt the wait: its byte ends it.
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)

    def stop(status: int) -> None:
        statuses.append(status)
        with suppress(OSError):  # full or closed: the loop wakes, or has ended
            wake.send(b"\0")

    service = Service(worker, policies, site.worker.deadline, stop)
    mode, group = _permissions(site.worker.group)
    path = site.worker.socket
    with sockets.listen(path, mode=mode, group=group) as listener:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop(0))
        log.info("ready")
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            while not statuses:
                for key, _ in selector.select():
                    if key.fileobj is listener:
                        service.take(listener.accept()[0])
    path.unlink(missing_ok=True)
    service.drain(_DRAIN_SECONDS)
    log.info("stopped with status %d", statuses[0])
    return statuses[0]


def _permissions(group: str | None) -> tuple[int, int | None]:
    """Mode and group id of the socket.

    Raises:
        ConfigError: 201, there is no such group.
    """
    if group is None:
        return 0o600, None
    try:
        return 0o660, grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(
            201, f"site.toml: worker.group: must be a group of this machine, got {group!r}"
        ) from None


def _lock(home: Path) -> BinaryIO:
    """Lock the home for this process.

    Raises:
        DeployError: 901, there is no such folder; 902, another worker holds it.
    """
    try:
        return take_lock(home / LOCK)
    except BlockingIOError:
        raise DeployError(902, f"{home}: must be free, got a lock of another worker") from None
    except OSError as error:
        raise DeployError(901, f"{home}: must be a site's home, got {error.strerror}") from None


def _log_to_stderr(site: str) -> None:
    def add(record: logging.LogRecord) -> bool:
        record.site, record.run, record.round = site, RUN.get(), ROUND.get()
        return True

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(add)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _command_line() -> int:
    parser = argparse.ArgumentParser(prog="fedge worker", description="A site's resident worker.")
    parser.add_argument("home", type=Path, help="holds site.toml and policy.toml")
    parser.add_argument("--with-parent", action="store_true", help="end when the parent dies")
    arguments = parser.parse_args()
    return main(arguments.home, with_parent=arguments.with_parent)


if __name__ == "__main__":
    exit_status = guarded("fedge worker", _command_line)
    logging.shutdown()
    sys.stderr.flush()
    # A thread may still train; a regular interpreter shutdown would unload torch while it is in use.
    os._exit(exit_status)
