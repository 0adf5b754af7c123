"""What an operator does with a server's home: make it, submit runs, look, stop. The daemon notices by itself."""

from __future__ import annotations

import json
import re
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedge.server.deployment import certificates, server_config
from fedge.server.deployment.run_scheduler import STOP_REQUEST, in_order
from fedge.server.runs.directory import RunDirectory, prepare, state_of
from fedge.shared.config import reader
from fedge.shared.daemon import home as homes
from fedge.shared.errors import DeployError, FedgeError, RunError
from fedge.shared.protocol import SITE_NAME
from fedge.shared.tasks.registry import get_task, require_task


def init(home: Path, address: str, listen: str | None = None, front: str | None = None) -> str:
    """Make a server's home.

    Returns:
        What was made, for people.

    Raises:
        DeployError: 903, there is one; 904, an address is not usable.
    """
    home = home.absolute()
    if (home / server_config.NAME).exists():
        raise DeployError(903, f"{home}: must be new, got a server's home")
    host, _ = homes.split_address(address)
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DeployError(901, f"{home}: must be a folder, got {error.strerror}") from None
    settings = server_config.check(address, listen, front)
    if not certificates.certificate_path(home).exists():
        # It may be there where an earlier init was killed before it wrote server.toml, which comes last.
        certificates.create(home, [host])
    (home / "runs").mkdir(exist_ok=True)
    server_config.write(home, settings)
    return (
        f"home     {home}\n"
        f"listen   {settings.server.listen}, front {settings.server.front}\n"
        f"ca.crt   {certificates.authority_path(home)}  (give it to the sites)"
    )


def submit(home: Path, path: Path, overrides: Sequence[str] = (), name: str | None = None) -> str:
    """Queue a run; the server plays it as soon as it runs.

    Returns:
        The run's name.

    Raises:
        DeployError: 901, not a server's home; 914, the name cannot be one.
        ConfigError: 201 to 211.
    """
    server_config.load(home)
    config = reader.load(path, overrides)
    require_task(config.task.name)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = name or f"{stamp}-{secrets.token_hex(2)}"
    if not re.fullmatch(SITE_NAME, name):
        raise DeployError(914, f"--name: must match {SITE_NAME}, got {name[:80]!r}")
    # Only here: it imports torch, which those who look, and whom the above refuses, need not wait for.
    from fedge.shared.privacy.checks.compatibility import require_compatible

    require_compatible(
        config.privacy, get_task(config.task.name), config.secure_aggregation.min_sites
    )
    prepare(home / "runs" / name, config, resume=False)
    return name


def _directory(home: Path, name: str) -> Path:
    server_config.load(home)
    path = home / "runs" / name
    if not re.fullmatch(SITE_NAME, name) or not path.is_dir():
        raise DeployError(
            914, f"run {name[:80]!r}: must be one of `fedge server runs`, got none such"
        )
    return path


def resume(home: Path, name: str) -> str:
    """Let a stopped run go on where its journal ends.

    Returns:
        What becomes of it, for people.

    Raises:
        DeployError: 914, no such run.
        ConfigError: 208, it runs already.
        RunError: 503, all its rounds are played, and none made a model.
    """
    path = _directory(home, name)
    told = _json(path / "run.json")
    if state_of(path) == "stopped" and _over(told):
        raise RunError(
            503,
            f"run {name}: must have a round left, got {told['rounds_done']} of {told['rounds']} played and no model",
        )
    prepare(path, RunDirectory(path).load_config(), resume=True)
    # A request to stop that nobody has seen yet was taken back.
    (path / STOP_REQUEST).unlink(missing_ok=True)
    return f"{name} is {state_of(path)}" if state_of(path) == "finished" else f"{name} goes on"


def stop(home: Path, name: str | None = None) -> str:
    """Ask a run to end after what it is doing, or end the server.

    Returns:
        What becomes of it, for people.

    Raises:
        DeployError: 911, the server does not run; 914, no such run.
    """
    if name is not None:
        path = _directory(home, name)
        if state_of(path) != "unfinished":
            return f"{name} is {state_of(path)} already"
        (path / STOP_REQUEST).touch()
        return f"{name} stops after what it is doing"
    server_config.load(home)
    if not homes.held(home):
        raise DeployError(911, f"{home}: must be run by a daemon, got none")
    homes.end(home)
    return "the server has ended"


def runs(home: Path) -> list[dict[str, Any]]:
    """All runs of a server, oldest first."""
    server_config.load(home)
    found = []
    for path in in_order(home / "runs"):
        told = _json(path / "run.json")
        stopped = _json(path / "stopped.json")
        found.append(
            {
                "name": path.name,
                "state": state_of(path),
                "task": told.get("task"),
                "strategy": told.get("strategy"),
                "rounds": told.get("rounds"),
                "rounds_done": told.get("rounds_done", 0),
                "sites": len(told.get("sites") or {}),
                "begun": (path / "journal.db").is_file(),
                "stopped": stopped or None,
                "over": bool(stopped) and _over(told),
                "directory": str(path),
            }
        )
    return found


def status(home: Path) -> dict[str, Any]:
    """The server's processes, sites and runs."""
    settings = server_config.load(home)
    running = homes.held(home)
    told = homes.status(home) or {}
    try:
        days: int | None = certificates.check(home, datetime.now(UTC))
        problem = certificates.warning(days or 0)
    except FedgeError as error:
        days, problem = None, str(error)
    return {
        "running": running,
        "healthy": running and days is not None and days > 0,
        "address": settings.server.address,
        "listen": settings.server.listen,
        "certificate": {"days_left": days, "problem": problem},
        "services": told.get("services", {}) if running else {},
        "sites": told.get("sites", {}) if running else {},
        "problem": str(told.get("roster") or "") if running else "",
        "runs": runs(home),
    }


def status_text(found: Mapping[str, Any]) -> str:
    """A status as people read it."""
    certificate = found["certificate"]
    good = f"good for {certificate['days_left']} days"
    lines = [
        f"server       {'running' if found['running'] else 'not running'}, {found['address']}",
        f"certificate  {certificate['problem'] or good}",
    ]
    if found["problem"]:
        lines.append(f"problem      {found['problem']}")
    for name, service in found["services"].items():
        restarts = f", {service['restarts']} restarts" if service["restarts"] else ""
        lines.append(f"{name:12} {service['state']}, pid {service['pid']}{restarts}")
    if found["sites"]:
        lines.append("sites")
        lines += [f"  {name:24} {site['state']}" for name, site in found["sites"].items()]
    return "\n".join([*lines, runs_text(found["runs"])])


def runs_text(found: Sequence[Mapping[str, Any]]) -> str:
    """Runs as people read them, a line each."""
    if not found:
        return "no runs"
    lines = [f"{'run':32} {'state':10} {'rounds':>9}  task"]
    for run in found:
        rounds = f"{run['rounds_done']}/{run['rounds'] or '?'}"
        why = f"  {run['stopped'].get('code')}" if run["stopped"] else ""
        state = run["state"]
        if state == "unfinished" and not run["task"]:
            state = "gathering" if run["begun"] else "queued"
        lines.append(f"{run['name']:32} {state:10} {rounds:>9}  {run['task'] or ''}{why}")
        if run["stopped"] and run["stopped"].get("message"):
            message = textwrap.shorten(str(run["stopped"]["message"]), 300, placeholder=" …")
            lines.append(f"  {message}")
            lines.append(f"  {_advice(run)}")
    return "\n".join(lines)


def _advice(run: Mapping[str, Any]) -> str:
    if run.get("over"):
        return "the run is over without a model; mend the cause, then submit a new one"
    played = run["rounds"] is not None and run["rounds_done"] >= run["rounds"]
    more = " (no round is left: it writes the model)" if played else ""
    return f"mend the cause, then: fedge server resume {run['name']}{more}"


def _over(told: Mapping[str, Any]) -> bool:
    """Whether run.json tells of a run without a round left and without a model: nothing can come of it any more.

    Where a round made a model, resuming writes the results.
    """
    sites, rounds, done = told.get("sites"), told.get("rounds"), told.get("rounds_done")
    if not (isinstance(sites, dict) and isinstance(rounds, int) and isinstance(done, int)):
        return False
    return done >= rounds and not any(
        site.get("rounds") for site in sites.values() if isinstance(site, dict)
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
