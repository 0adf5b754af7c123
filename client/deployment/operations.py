"""Operations of a site's administrator on its home: create it, and check the site's health."""

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

#: Days before a certificate's expiry from which the status warns.
WARN_DAYS = 30
#: Seconds after which a check of the server is outdated; the daemon checks every 30 s.
LINK_STALE = 90.0


@dataclass(frozen=True)
class Trust:
    """Files that a site installs for secure aggregation.

    Attributes:
        roster: path of a signed roster.
        consortium: path of the public key that signed it.
    """

    roster: Path
    consortium: Path


@dataclass(frozen=True)
class _SignedRoster:
    """The consortium's key and the roster as bytes, and the roster's content."""

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
    """Create a site's home: keys, site.toml, and a policy that allows this task, this release and its bundle only.

    Args:
        home: new, or empty.
        name: of the site.
        task: name of the task that its worker serves.
        server: host:port.
        ca: certificate of the server's CA, is copied.
        data: path that the task reads.
        share: folder of .npy files instead, as ``fedge up`` writes them.
        bundle: SHA-256 of the Flower bundle to approve; that of this release where None. If given, the task
            is not looked up, which would import torch.
        secure: terms of secure aggregation, for the policy.
        privacy: terms of differential privacy, for the policy.
        trust: is installed; the roster must list this site with the ``signing.key`` that is in the home already.

    Returns:
        A summary of the home's files, as text.

    Raises:
        DeployError: 901, 903, 904, 908; 917, the roster is not usable; 919, it does not list this site and its key.
        ReleaseError: 602, ``signing.key`` is not usable.
        ConfigError: 201, the name is not allowed.
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
        # Torch is imported only for a task that is installed.
        require_task(task)
        get_task(task)
    signed = _signed_roster(home, name, trust) if trust else None
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(ca, home / "ca.crt")
    except OSError as error:
        raise DeployError(901, f"{error.filename}: must be usable, got {error.strerror}") from None
    bundle = bundle or app_bundle.sha256()
    _keys(home)
    if signed is not None:
        write_atomically(home / trusted_roster.TRUST, signed.key)
        write_atomically(home / trusted_roster.FILE, signed.roster)
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
    return _summary(home, bundle, signed.listed if signed else None)


def _require_usable(home: Path, ca: Path) -> None:
    """Check the paths before anything is imported or created.

    Raises:
        DeployError: 901, the CA certificate cannot be read, or the home not created.
    """
    try:
        ca.open("rb").close()
    except OSError as error:
        raise DeployError(901, f"{error.filename}: must be usable, got {error.strerror}") from None
    if not next(path for path in (home, *home.parents) if path.exists()).is_dir():
        raise DeployError(901, f"{home}: must be usable, got Not a directory")


def _keys(home: Path) -> None:
    """Create the keys that are not in a home yet.

    Raises:
        DeployError: 908, an existing key is not usable.
    """
    if (home / node_key.PRIVATE_NAME).exists() and (home / node_key.PUBLIC_NAME).exists():
        # Left by an init that was killed or refused: site.toml is written last. The server may know the key already.
        node_key.check(home / node_key.PRIVATE_NAME)
    else:
        node_key.create(home)
    if not (home / trusted_roster.KEY).exists():
        dsse.new_key(home / trusted_roster.KEY)


def _summary(home: Path, bundle: str, listed: Roster | None) -> str:
    """The files of a new home and the next steps, as text."""
    if listed is None:
        public = dsse.public_path(home / trusted_roster.KEY)
        signing = f"signing   {public}  (give it to the consortium: fedge roster add)\n"
    else:
        signing = (
            f"roster    {home / trusted_roster.FILE}  (version {listed.version} of {listed.consortium}, "
            f"{len(listed.sites)} sites)\n"
        )
    return (
        f"home      {home}\n"
        f"key       {home / node_key.PUBLIC_NAME}  (give it to the server: fedge server admit)\n"
        f"{signing}"
        f"policy    {home / 'policy.toml'}\n"
        f"bundle    {bundle}  (compare with: fedge server bundle)"
    )


def _signed_roster(home: Path, name: str, trust: Trust) -> _SignedRoster:
    """Check that the signed roster lists the key in a home, before anything is written there.

    Raises:
        DeployError: 917, the roster is not usable; 919, it does not list this site and its key.
        ReleaseError: 602, ``signing.key`` is not usable.
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
    return _SignedRoster(key, data, listed)


def status(home: Path) -> dict[str, Any]:
    """The site's health: connection to its server, certificate, worker and privacy budget.

    Args:
        home: of the site.

    Returns:
        Values for JSON; ``healthy`` is true if everything works.

    Raises:
        DeployError: 901, not a site's home.
        ConfigError: 201 to 204, the content of site.toml is not allowed.
    """
    site = site_config.load(home)
    running = homes.held(home)
    daemon = (homes.status(home) or {}) if running else {}
    services: dict[str, Any] = daemon.get("services", {})
    link = _current_link(daemon.get("link") or {})
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
    # The last state of Flower's node is valid only while the server is reachable.
    relay = "supernode" in services
    node = services.get("supernode", {}).get("state") == "ready"
    connected = node and bool(link.get("reachable", True))
    conditions = (worker is not None, not relay or (connected and bool(link.get("reachable"))))
    return {
        "site": site.site.name,
        "server": site.server.address,
        "running": running,
        "relay": relay,
        "connected": connected,
        "connected_since": daemon.get("connected_since"),
        "problem": daemon.get("problem") or "",
        "link": link,
        "services": services,
        "worker": worker,
        "worker_problem": problem,
        "privacy": budget_status.spent(home),
        "healthy": running and all(conditions) and not daemon.get("problem") and not problem,
    }


def _unserved(home: Path, task: str) -> str:
    """Why a running worker serves nothing; empty where it serves, or where the policy is another user's."""
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


def _current_link(link: dict[str, Any]) -> dict[str, Any]:
    """The last check of the server; unreachable where the check is outdated, or dated in the future."""
    age = time.time() - float(link.get("at", 0)) if link else 0.0
    if abs(age) <= LINK_STALE:
        return link
    return link | {"reachable": False, "problem": f"not checked since {age:.0f} s"}


def status_text(status: Mapping[str, Any]) -> str:
    """The result of ``status`` as text."""
    link, worker = status["link"], status["worker"]
    days = link.get("days_left")
    certificate = link.get("problem") or f"certificate good for {days} days"
    if isinstance(days, int) and days < WARN_DAYS:
        certificate = f"certificate ends in {days} days"
    lines = [f"site       {status['site']}, {'running' if status['running'] else 'not running'}"]
    if status["relay"]:
        state = "connected" if status["connected"] else "not connected"
        lines.append(
            f"server     {status['server']}, {state}, {certificate if link else 'not checked yet'}"
        )
    if status["problem"]:
        lines.append(f"problem    {status['problem']}")
    if status["worker_problem"]:
        lines.append(f"problem    {status['worker_problem']}")
    if worker is not None:
        lines.append(
            f"serves     task {worker.get('task')}, device {worker.get('device')}, pid {worker.get('pid')}"
        )
    if status["privacy"] is not None:
        from fedge.client.deployment import budget_status

        lines += budget_status.lines(status["privacy"])
    for name, service in status["services"].items():
        restarts = f", {service['restarts']} restarts" if service["restarts"] else ""
        lines.append(f"{name:10} {service['state']}, pid {service['pid']}{restarts}")
    return "\n".join(lines)
