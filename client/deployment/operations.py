"""What a site's administrator does with its home: make it, and look whether the site is well."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge.client.deployment import node_key
from fedge.client.secagg import trusted_roster
from fedge.client.settings import site_config
from fedge.shared.config import home_files
from fedge.shared.crypto import dsse
from fedge.shared.daemon import home as homes
from fedge.shared.errors import BundleError, DeployError, FedgeError
from fedge.shared.files import read_bounded, reason, write_atomically
from fedge.shared.flower import app_bundle
from fedge.shared.roster.roster import MAX_FILE, Roster, open_roster
from fedge.shared.tasks.registry import get_task, require_task

if TYPE_CHECKING:
    from fedge.client.settings.policy import SecurePolicy
    from fedge.client.settings.privacy_policy import PrivacyPolicy

#: Days before its end from which a certificate is worth a warning.
WARN_DAYS = 30
#: Seconds from which a look at the server is no news; the daemon looks every 30 s.
LINK_STALE = 90.0


@dataclass(frozen=True)
class Trust:
    """What a site installs to take part in secure aggregation: a signed roster, and the key that signed it."""

    roster: Path
    consortium: Path


@dataclass(frozen=True)
class _Vouched:
    """Both as they will lie in the home, and what the roster says."""

    key: bytes
    roster: bytes
    listed: Roster


def init(
    home: Path,
    name: str,
    *,
    task: str,
    server: str,
    ca: Path,
    data: Path | None = None,
    share: Path | None = None,
    bundle: str | None = None,
    secure: SecurePolicy | None = None,
    privacy: PrivacyPolicy | None = None,
    trust: Trust | None = None,
) -> str:
    """Make a site's home: keys, site.toml, and a policy that allows this task, this release and its bundle only.

    Args:
        home: new, or empty.
        name: of the site.
        task: that its worker serves.
        server: host:port.
        ca: certificate of the server's authority, copied.
        data: for the task's reader.
        share: folder of arrays instead, as ``fedge up`` divides them.
        bundle: SHA-256 of the Flower bundle to approve; that of this release where None. With one given the task
            is not looked up, which would import torch.
        secure: terms of secure aggregation, for the policy.
        privacy: terms of differential privacy, for the policy.
        trust: is installed; the roster must hold this site with the ``signing.key`` that lies in the home already.

    Returns:
        What was made, for people.

    Raises:
        DeployError: 901, 903, 904, 908; 917, the roster is not usable; 919, it does not hold this site and its key.
        ReleaseError: 602, ``signing.key`` is not usable.
        ConfigError: 201, the name is not one.
        DataError: 304, there is no such task.
    """
    home = home.absolute()
    if (home / "site.toml").exists():
        raise DeployError(903, f"{home}: must be new, got a site's home")
    homes.split_address(server)
    tree = {"site": {"name": name, "task": task}, "server": {"address": server}}
    home_files.check(tree, site_config.SiteFile, site_config.FILE)
    _require_usable(home, ca)
    if bundle is None:
        # Torch is imported only for a task that is there.
        require_task(task)
        get_task(task)
    vouched = _vouched(home, name, trust) if trust else None
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(ca, home / "ca.crt")
    except OSError as error:
        raise DeployError(901, f"{error.filename}: must be usable, got {error.strerror}") from None
    bundle = bundle or app_bundle.sha256()
    _keys(home)
    if vouched is not None:
        write_atomically(home / trusted_roster.TRUST, vouched.key)
        write_atomically(home / trusted_roster.FILE, vouched.roster)
        trusted_roster.read(home)
    # Here, as it imports Flower.
    from fedge.client.settings import policy_writer

    policy_writer.write(
        home,
        tasks=[task],
        bundles=[bundle],
        versions=[version("fedge")],
        secure=secure,
        privacy=privacy,
    )
    examples = site_config.OwnData(path=data.absolute() if data else None, share=share)
    site_config.write(home, name=name, task=task, address=server, data=examples)
    return _made(home, bundle, vouched.listed if vouched else None)


def _require_usable(home: Path, ca: Path) -> None:
    """Look at the paths before anything is imported or made.

    Raises:
        DeployError: 901, the authority cannot be read, or the home not made.
    """
    try:
        ca.open("rb").close()
    except OSError as error:
        raise DeployError(901, f"{error.filename}: must be usable, got {error.strerror}") from None
    if not next(path for path in (home, *home.parents) if path.exists()).is_dir():
        raise DeployError(901, f"{home}: must be usable, got Not a directory")


def _keys(home: Path) -> None:
    """Make the keys that are not in a home yet.

    Raises:
        DeployError: 908, the key that is there is not usable.
    """
    if (home / node_key.PRIVATE_NAME).exists() and (home / node_key.PUBLIC_NAME).exists():
        # Of an init that was killed, or refused a name: site.toml comes last. The server may know the key already.
        node_key.check(home / node_key.PRIVATE_NAME)
    else:
        node_key.create(home)
    if not (home / trusted_roster.KEY).exists():
        dsse.new_key(home / trusted_roster.KEY)


def _made(home: Path, bundle: str, listed: Roster | None) -> str:
    """What lies in a new home, and what is to be done with it, for people."""
    if listed is None:
        public = dsse.public_path(home / trusted_roster.KEY)
        known = f"signing   {public}  (give it to the consortium: fedge roster add)\n"
    else:
        known = (
            f"roster    {home / trusted_roster.FILE}  (version {listed.version} of {listed.consortium}, "
            f"{len(listed.sites)} sites)\n"
        )
    return (
        f"home      {home}\n"
        f"key       {home / node_key.PUBLIC_NAME}  (give it to the server: fedge server admit)\n"
        f"{known}"
        f"policy    {home / 'policy.toml'}\n"
        f"bundle    {bundle}  (compare with: fedge server bundle)"
    )


def _vouched(home: Path, name: str, trust: Trust) -> _Vouched:
    """Check that the roster vouches for the key in a home, before anything is written there.

    Raises:
        DeployError: 917, 919.
        ReleaseError: 602.
    """
    try:
        signed_by = dsse.load_public(trust.consortium)
        key = read_bounded(trust.consortium, MAX_FILE)
        data = read_bounded(trust.roster, MAX_FILE)
    except BundleError as error:
        raise DeployError(917, error.message) from None
    except OSError as error:
        raise DeployError(917, f"{trust.roster}: cannot be read ({reason(error)})") from None
    listed = open_roster(data, signed_by)
    if not (home / trusted_roster.KEY).exists():
        raise DeployError(
            919, f"{home / trusted_roster.KEY}: must be there, with the key of {name} in the roster"
        )
    private = trusted_roster.own_key(home)
    trusted_roster.require_own(listed, name, private, datetime.now(UTC).date())
    return _Vouched(key, data, listed)


def status(home: Path) -> dict[str, Any]:
    """Whether the site is well: connected to its server, certificate good, worker there."""
    site = site_config.load(home)
    running = homes.held(home)
    told = (homes.status(home) or {}) if running else {}
    services: dict[str, Any] = told.get("services", {})
    link = _as_of_now(told.get("link") or {})
    worker: dict[str, Any] | None
    # Here, as these import Flower.
    from fedge.client.deployment import budget_status
    from fedge.client.relay.worker_client import SocketLink

    try:
        worker = SocketLink(home.absolute() / site.worker.socket, deadline=5.0).status()
    except FedgeError as error:
        worker, problem = None, str(error)
    else:
        problem = _unserved(home, site.site.task)
    # What Flower's node last said of itself counts only while the line is there.
    relay = "supernode" in services
    node = services.get("supernode", {}).get("state") == "ready"
    connected = node and bool(link.get("reachable", True))
    wanted = (worker is not None, not relay or (connected and bool(link.get("reachable"))))
    return {
        "site": site.site.name,
        "server": site.server.address,
        "running": running,
        "relay": relay,
        "connected": connected,
        "connected_since": told.get("connected_since"),
        "problem": told.get("problem") or "",
        "link": link,
        "services": services,
        "worker": worker,
        "worker_problem": problem,
        "privacy": budget_status.spent(home),
        "healthy": running and all(wanted) and not told.get("problem") and not problem,
    }


def _unserved(home: Path, task: str) -> str:
    """Why the worker, though it answers, serves nothing; empty where it does, or where the policy is another user's."""
    from fedge.client.settings import policy

    try:
        allowed = policy.read(home)
    except DeployError:
        return ""
    except FedgeError as error:
        return str(error)
    if task in allowed.tasks:
        return ""
    return f"FE-418 policy.toml: tasks must hold {task}, or nothing is served"


def _as_of_now(link: dict[str, Any]) -> dict[str, Any]:
    """A look at the server, which counts as none where it is too old, or of a time to come."""
    age = time.time() - float(link.get("at", 0)) if link else 0.0
    if abs(age) <= LINK_STALE:
        return link
    return link | {"reachable": False, "problem": f"not checked since {age:.0f} s"}


def status_text(found: Mapping[str, Any]) -> str:
    """A status as people read it."""
    link, worker = found["link"], found["worker"]
    days = link.get("days_left")
    reach = link.get("problem") or f"certificate good for {days} days"
    if isinstance(days, int) and days < WARN_DAYS:
        reach = f"certificate ends in {days} days"
    lines = [f"site       {found['site']}, {'running' if found['running'] else 'not running'}"]
    if found["relay"]:
        state = "connected" if found["connected"] else "not connected"
        lines.append(
            f"server     {found['server']}, {state}, {reach if link else 'not checked yet'}"
        )
    if found["problem"]:
        lines.append(f"problem    {found['problem']}")
    if found["worker_problem"]:
        lines.append(f"problem    {found['worker_problem']}")
    if worker is not None:
        lines.append(
            f"serves     task {worker.get('task')}, device {worker.get('device')}, pid {worker.get('pid')}"
        )
    if found["privacy"] is not None:
        from fedge.client.deployment import budget_status

        lines += budget_status.lines(found["privacy"])
    for name, service in found["services"].items():
        restarts = f", {service['restarts']} restarts" if service["restarts"] else ""
        lines.append(f"{name:10} {service['state']}, pid {service['pid']}{restarts}")
    return "\n".join(lines)
