"""A whole federation on this machine: Flower's SuperLink over TLS, and a daemon with a worker for every site.

The processes, keys and certificates are those of a deployment; only the addresses are loopback ones. The run directory
is that of a simulation, with the server's home in ``server/`` and each site's in ``sites/NAME/``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from fedge.server.runs.directory import RunDirectory, state_of
from fedge.server.runs.journal import Journal
from fedge.shared.config.federation import Config
from fedge.shared.daemon import home as homes
from fedge.shared.daemon import process
from fedge.shared.daemon.process import Program
from fedge.shared.daemon.supervisor import Service, Supervisor
from fedge.shared.errors import ConfigError, DeployError
from fedge.simulations.federation_startup import SOCKET, error_of, prepared

#: Modules imported before the first fork, so that every fork shares them; only workers and coordinator need torch.
_FLOWER: Final = (
    "flwr.cli.app",
    "flwr.supercore.cli",
    "flwr.superlink.cli",
    "flwr.superlink.main",
    "flwr.supernode.cli",
    "flwr.supernode.main",
    # Flower's client and its server import these at the first request.
    "httpcore",
    "anyio.streams.tls",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
    "fedge.client.deployment.daemon",
    "fedge.server.deployment.daemon",
)
#: Failed starts of a daemon after which the federation is stopped.
MAX_FAILURES: Final = 4
#: Seconds in which the server must be ready, from the beginning and after a restart.
READY_WITHIN: Final = 120.0
#: Seconds that a daemon has to end, as it ends its own services one layer after the other.
DAEMON_GRACE: Final = 25.0


def federate(
    config: Config, out: Path, *, resume: bool = False, quiet: bool = False
) -> RunDirectory:
    """Run the federation of a configuration with real processes, in the foreground.

    Args:
        config: what to run; ``sites.count`` sites.
        out: the run directory.
        resume: continue the run in ``out``, or start where there is none.
        quiet: show no progress.

    Returns:
        The run's directory, complete.

    Raises:
        ConfigError, DataError: as ``simulate``.
        RunError: 501 to 509, the run stopped; what was committed stays.
        DeployError: 902, a federation runs in ``out`` already; 905 or 906, a daemon does not start.
        KeyboardInterrupt: SIGINT or SIGTERM; every process has ended.
    """
    out = out.absolute()
    if homes.held(out / "federation"):
        raise DeployError(902, f"{out}: must be free, got a running federation")
    # Before the first fork, as workers and coordinator need Flower too.
    process.preload(_FLOWER)
    from fedge.simulations.local_homes import make_homes

    with prepared(config, out, resume=resume) as finished:
        if not finished:
            (out / "federation").mkdir(exist_ok=True)
            with homes.lock(out / "federation"):
                make_homes(config, out)
                _supervise(RunDirectory(out), quiet=quiet)
            _sweep(out)
    directory = RunDirectory(out)
    if directory.journal.is_file():
        # Its last user leaves it as one file, even if another process had it open when the coordinator closed it.
        Journal(directory.journal).close()
    _raise_if_stopped(directory)
    return directory


def _supervise(directory: RunDirectory, *, quiet: bool) -> None:
    from fedge.client.deployment import daemon as site_daemon
    from fedge.server.deployment import daemon as server_daemon

    out = directory.path
    supervisor = Supervisor(out / "federation")
    names = sorted(path.parent.name for path in (out / "sites").glob("*/site.toml"))
    daemons = {"server": (out / "server", server_daemon.run)}
    daemons |= {name: (out / "sites" / name, site_daemon.run) for name in names}
    for name, (home, run) in daemons.items():
        supervisor.add(
            Service(
                name,
                partial(
                    Program, f"fedge {name} --home {home}", supervisor.log_of(name),
                    function=partial(run, home, fork_server=out / SOCKET),
                ),
                ready=partial(_is_ready, home, names if name == "server" else ()),
                after=() if name == "server" else ("server",),
                grace=DAEMON_GRACE,
            )
        )  # fmt: skip
    if not quiet:
        watch = partial(_watch, directory, names)
        program = Program("fedge up", supervisor.log_of("watch"), function=watch, terminal=True)
        supervisor.task("watch", program)
    next_look, deadline = 0.0, time.monotonic() + READY_WITHIN

    def tick() -> None:
        nonlocal next_look, deadline
        if time.monotonic() < next_look:
            return
        next_look = time.monotonic() + 0.25
        if state_of(out) != "unfinished":
            _let_watcher_finish(supervisor)
            supervisor.stop()
        for service in supervisor.services.values():
            if service.failures >= MAX_FAILURES and not service.is_ready:
                supervisor.facts["failed"] = service.name
                supervisor.stop()
        if supervisor.services["server"].is_ready:
            deadline = time.monotonic() + READY_WITHIN
        elif time.monotonic() > deadline:
            supervisor.facts["late"] = True
            supervisor.stop()

    supervisor.ticks.append(tick)
    supervisor.run()
    if failed := supervisor.facts.get("failed"):
        log = supervisor.log_of(str(failed))
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        raise DeployError(906, f"{failed}: must start, got {lines[-1][:300]!r} in {log}")
    if supervisor.facts.get("late"):
        services = (homes.status(out / "server") or {}).get("services", {})
        waiting = [name for name, service in services.items() if service["state"] != "ready"]
        raise DeployError(
            905,
            f"server: must be ready within {READY_WITHIN:g} s, got none of {', '.join(waiting)};"
            f" see {out / 'server' / 'log'}",
        )
    if supervisor.ended_by:
        raise KeyboardInterrupt


def _is_ready(home: Path, registered: Sequence[str] = ()) -> bool:
    """Whether a daemon's services are ready and, for the server's, whether Flower knows these sites' keys."""
    status = homes.status(home)
    if status is None or not homes.held(home):
        return False
    ready = all(service["state"] == "ready" for service in status.get("services", {}).values())
    return ready and set(registered) <= set(status.get("registered") or ())


def _let_watcher_finish(supervisor: Supervisor) -> None:
    """Give the process that shows the progress a moment to show the last round."""
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        if not any(process.birth(pid) for pid in supervisor.alive("watch")):
            return
        time.sleep(0.05)


def _watch(directory: RunDirectory, names: list[str]) -> None:
    """Show how the federation starts, then its rounds; a process of its own, as it has threads."""
    from fedge.server.runs import events
    from fedge.simulations.terminal.progress import Progress

    started = time.monotonic()
    out = directory.path

    def say(text: str) -> None:
        sys.stderr.write(f"{text}, {time.monotonic() - started:.0f} s\n")
        sys.stderr.flush()

    homes_by_name = {"server": out / "server"} | {name: out / "sites" / name for name in names}
    shown: set[str] = set()
    while state_of(out) == "unfinished" and not _began(directory):
        ready = {name for name, home in homes_by_name.items() if _is_ready(home)}
        if "server" in ready - shown:
            say("server ready")
        if len(ready - {"server"}) > len(shown - {"server"}):
            say(f"{len(ready - {'server'})} of {len(names)} sites connected")
        shown |= ready
        time.sleep(0.2)
    with Progress() as progress:
        events.follow(out / events.NAME, progress, lambda: state_of(out) != "unfinished")


def _began(directory: RunDirectory) -> bool:
    from fedge.server.runs.events import NAME

    path = directory.path / NAME
    return path.is_file() and path.stat().st_size > 0


def _raise_if_stopped(directory: RunDirectory) -> None:
    state = state_of(directory.path)
    if state == "finished":
        return
    try:
        stopped = json.loads((directory.path / "stopped.json").read_text(encoding="utf-8"))
        code, message = int(str(stopped["code"]).removeprefix("FE-")), str(stopped["message"])
    except (OSError, ValueError, KeyError, TypeError):
        code, message = 509, f"{directory.path}: must be finished, got {state}"
    raise error_of(code, message)


def _sweep(out: Path) -> int:
    """End processes that a killed daemon has left."""
    places = [out / "server", *sorted((out / "sites").glob("*"))]
    return sum(homes.end(place, grace=2.0) for place in places)


def down(out: Path) -> int:
    """End a federation that was left, and every process of it.

    Returns:
        How many processes were ended.

    Raises:
        ConfigError: 209, no federation ran there.
    """
    out = out.absolute()
    if not (out / "federation").is_dir():
        raise ConfigError(209, f"{out}: must be a run directory of `fedge up`, got none")
    ended = homes.end(out / "federation", grace=2 * DAEMON_GRACE)
    # A process that was being started in between is listed by now.
    return ended + _sweep(out) + _sweep(out)


__all__ = ["down", "federate"]
