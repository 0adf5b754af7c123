"""The homes of a local federation: the server's, every site's, and the roster of a consortium of this directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from fedge.client.secagg import trusted_roster
from fedge.client.settings.policy import SecurePolicy
from fedge.client.settings.privacy_policy import simulated
from fedge.shared.config.federation import Config
from fedge.shared.crypto import dsse
from fedge.shared.daemon import home as homes
from fedge.shared.daemon import process
from fedge.shared.daemon.process import Program
from fedge.shared.files import write_atomically
from fedge.shared.flower import app_bundle
from fedge.simulations.consortium import signed_roster

#: Name of the run in the server's home; it is the run directory itself.
RUN: Final = "run"


def make_homes(config: Config, out: Path) -> None:
    """Create the home of the server, and of every site that has none yet.

    Args:
        config: of the run.
        out: the run directory, with the sites' shares of the data.
    """
    from fedge.client.deployment import operations as site
    from fedge.server.deployment import operations as server
    from fedge.server.deployment import site_registry
    from fedge.server.deployment.server_config import load

    home = out / "server"
    if not (home / "server.toml").exists():
        shutil.rmtree(home, ignore_errors=True)
        server.init(home, f"127.0.0.1:{homes.free_port()}")
    secure = config.secure_aggregation
    terms = _terms(config)
    link = home / "runs" / RUN
    if not link.is_symlink():
        link.symlink_to(Path("..") / "..", target_is_directory=True)
    address, bundle = load(home).server.address, app_bundle.sha256(_build_in_a_fork)
    for place in sorted((out / "sites").iterdir()):
        if (place / "site.toml").exists() or not (place / "share").is_dir():
            continue
        site.init(
            place,
            place.name,
            task=config.task.name,
            server=address,
            ca=home / "ca" / "ca.crt",
            share=Path("share"),
            bundle=bundle,
            secure=terms,
            # As in a simulation: these sites have no owner who could raise a budget.
            privacy=simulated(),
        )
        if place.name in site_registry.site_keys(home):
            site_registry.expel(home, place.name)
        site_registry.admit(home, place.name, place / "site.pub")
    if secure.enabled:
        _install_roster(out)


def _terms(config: Config) -> SecurePolicy:
    """Every site's policy for secure aggregation: the run's own bounds, as sites and run have the same owner."""
    secure = config.secure_aggregation
    if not secure.enabled:
        return SecurePolicy()
    own = SecurePolicy()
    return SecurePolicy.model_validate(
        {
            "required": True,
            "min-sites": secure.min_sites,
            "max-clipping-bound": max(secure.clipping_bound, own.max_clipping_bound),
            "max-value-bound": max(secure.value_bound, own.max_value_bound),
            "max-state-bound": max(secure.state_bound, own.max_state_bound),
        }
    )


def _install_roster(out: Path) -> None:
    """Give every site a roster of all of them, signed by a consortium of this directory."""
    key = out / "federation" / "consortium.key"
    if not key.exists():
        dsse.new_key(key)
    sites = sorted((out / "sites").iterdir())
    if all((place / trusted_roster.FILE).exists() for place in sites):
        return
    keys = {place.name: trusted_roster.own_key(place) for place in sites}
    signed = signed_roster(keys, dsse.load_private(key))
    for place in sites:
        shutil.copyfile(dsse.public_path(key), place / trusted_roster.TRUST)
        write_atomically(place / trusted_roster.FILE, signed)


def _build_in_a_fork(folder: Path) -> str:
    """``flwr build`` without a new interpreter."""

    def build() -> int | None:
        os.chdir(folder)
        return process.script("flwr", ["build"])()

    log = folder.parent / "log"
    os.waitpid(process.start(Program("flwr build", log, function=build)), 0)
    return log.read_text(encoding="utf-8", errors="replace")
