"""An operator's actions on a server's home: create it, submit runs, show status, stop. The daemon polls for them."""

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
    """Create a server's home.

    Args:
        home: folder to create.
        address: host:port that the sites dial.
        listen: ip:port where this machine accepts them, if different.
        front: "none" or "nginx"; chosen by the addresses where None.

    Returns:
        A summary as text.

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
    """Queue a run; the server executes it as soon as it can.

    Args:
        home: of the server.
        path: the run's configuration, TOML.
        overrides: KEY=VALUE for keys of the configuration.
        name: of the run; made from the time where None.

    Returns:
        The run's name.

    Raises:
        DeployError: 901, not a server's home; 914, the name cannot be one.
        ConfigError: 201 to 211.
        DataError: 304, 305, the task is not there, or its network cannot be trained or released.
    """
    server_config.load(home)
    config = reader.load(path, overrides)
    require_task(config.task.name)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = name or f"{stamp}-{secrets.token_hex(2)}"
    if not re.fullmatch(SITE_NAME, name):
        raise DeployError(914, f"--name: must match {SITE_NAME}, got {name[:80]!r}")
    # Imported late, as it imports torch: other actions, and refusals above, need not wait for that.
    from fedge.shared.compile.onnx_export import require_exportable
    from fedge.shared.privacy.checks.compatibility import require_compatible
    from fedge.shared.tasks.dry_run import check

    task = get_task(config.task.name)
    check(task)
    require_exportable(task)
    require_compatible(config.privacy, task, config.secure_aggregation.min_sites)
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
    """Continue a stopped run from the end of its journal.

    Returns:
        The run's new state as text.

    Raises:
        DeployError: 914, no such run.
        ConfigError: 208, it runs already.
        RunError: 503, all its rounds are done, and none made a model.
    """
    path = _directory(home, name)
    run = _json(path / "run.json")
    if state_of(path) == "stopped" and _over(run):
        raise RunError(
            503,
            f"run {name}: must have a round left, got {run['rounds_done']} of {run['rounds']} done and no model",
        )
    prepare(path, RunDirectory(path).load_config(), resume=True)
    # This withdraws a request to stop that the daemon has not seen yet.
    (path / STOP_REQUEST).unlink(missing_ok=True)
    return f"{name} is {state_of(path)}" if state_of(path) == "finished" else f"{name} goes on"


def stop(home: Path, name: str | None = None) -> str:
    """Ask a run to end after its current step, or end the server where no run is named.

    Returns:
        The outcome as text.

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
    """All runs of a server, oldest first, as JSON values."""
    server_config.load(home)
    listing = []
    for path in in_order(home / "runs"):
        record = _json(path / "run.json")
        stopped = _json(path / "stopped.json")
        listing.append(
            {
                "name": path.name,
                "state": state_of(path),
                "task": record.get("task"),
                "strategy": record.get("strategy"),
                "rounds": record.get("rounds"),
                "rounds_done": record.get("rounds_done", 0),
                "sites": len(record.get("sites") or {}),
                "begun": (path / "journal.db").is_file(),
                "stopped": stopped or None,
                "over": bool(stopped) and _over(record),
                "directory": str(path),
            }
        )
    return listing


def status(home: Path) -> dict[str, Any]:
    """The server's processes, sites and runs, as JSON values."""
    settings = server_config.load(home)
    running = homes.held(home)
    daemon = homes.status(home) or {}
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
        "services": daemon.get("services", {}) if running else {},
        "sites": daemon.get("sites", {}) if running else {},
        "problem": str(daemon.get("roster") or "") if running else "",
        "runs": runs(home),
    }


def status_text(summary: Mapping[str, Any]) -> str:
    """The text of a ``status``."""
    certificate = summary["certificate"]
    good = f"good for {certificate['days_left']} days"
    lines = [
        f"server       {'running' if summary['running'] else 'not running'}, {summary['address']}",
        f"certificate  {certificate['problem'] or good}",
    ]
    if summary["problem"]:
        lines.append(f"problem      {summary['problem']}")
    for name, service in summary["services"].items():
        restarts = f", {service['restarts']} restarts" if service["restarts"] else ""
        lines.append(f"{name:12} {service['state']}, pid {service['pid']}{restarts}")
    if summary["sites"]:
        lines.append("sites")
        lines += [f"  {name:24} {site['state']}" for name, site in summary["sites"].items()]
    return "\n".join([*lines, runs_text(summary["runs"])])


def runs_text(listing: Sequence[Mapping[str, Any]]) -> str:
    """The text of ``runs``, a line each."""
    if not listing:
        return "no runs"
    lines = [f"{'run':32} {'state':10} {'rounds':>9}  task"]
    for run in listing:
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
        return "the run is over without a model; fix the cause, then submit a new one"
    all_done = run["rounds"] is not None and run["rounds_done"] >= run["rounds"]
    more = " (no round is left: it writes the model)" if all_done else ""
    return f"fix the cause, then: fedge server resume {run['name']}{more}"


def _over(record: Mapping[str, Any]) -> bool:
    """Whether run.json shows that all rounds are done and none made a model, so that the run cannot be continued.

    Where a round made a model, resuming writes the results.
    """
    sites, rounds, done = record.get("sites"), record.get("rounds"), record.get("rounds_done")
    if not (isinstance(sites, dict) and isinstance(rounds, int) and isinstance(done, int)):
        return False
    return done >= rounds and not any(
        site.get("rounds") for site in sites.values() if isinstance(site, dict)
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
