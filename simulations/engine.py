"""Simulate a federation: all sites and the server in this process, through the apps of a deployment."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedge.client.app import app as client_app
from fedge.client.data.dataset import SiteData, site_shares
from fedge.client.relay import message_relay
from fedge.client.relay.message_relay import DirectLink
from fedge.client.secagg.replay_guard import ReplayGuard
from fedge.client.secagg.secure_sums import FOLDER
from fedge.client.worker.handlers import SiteWorker
from fedge.server.app import app as server_app
from fedge.server.runs import listener as listeners
from fedge.server.runs import results
from fedge.server.runs.directory import RunDirectory, prepare
from fedge.server.runs.listener import Listener, NullListener
from fedge.server.secagg.restart_state import RecoveryStore
from fedge.shared.compile.onnx_export import require_exportable
from fedge.shared.config.federation import Config
from fedge.shared.privacy.checks.compatibility import require_compatible
from fedge.shared.tasks.dry_run import check
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.task import Task
from fedge.simulations.consortium import anchors
from fedge.simulations.grid import InProcessGrid


def simulate(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    app: ClientApp = client_app,
    grid: Callable[[Mapping[int, str], ClientApp, int], Grid] = InProcessGrid,
) -> RunDirectory:
    """Run the federation of a configuration and write its run directory.

    Args:
        config: what to run.
        out: the run directory, see docs/reference/run-directory.md.
        resume: continue the run in ``out``, or start where there is none.
        listener: called for every reply and round.
        app: the ClientApp of every site; fedge's relay unless an attack is rehearsed.
        grid: makes the grid from (site by node id, app, Flower run id); another one to rehearse a bad network.

    Returns:
        The run's directory, complete.

    Raises:
        ConfigError: 206 to 209, the directory cannot be used.
        DataError: 301 to 305, the data are missing or cannot be divided.
        RunError: 501 to 507, the run stopped; what was committed stays.
    """
    task = get_task(config.task.name)
    shares: dict[str, SiteData] = {}
    if not RunDirectory(out).says_finished():
        # Task and data come first: if they fail, no directory is created that a second try would find in use.
        check(task)
        require_exportable(task)
        require_compatible(config.privacy, task, config.secure_aggregation.min_sites)
        shares = site_shares(config, task)
    directory, finished = prepare(out, config, resume=resume)
    if finished:
        results.restore(directory)
        return directory
    shares = shares or site_shares(config, task)
    with (
        directory.lock(),
        _workers(config, task, directory, shares) as sites,
        listeners.listening(listener or NullListener()),
    ):
        flower_run_id = secrets.randbits(62)
        network = grid(dict(enumerate(sites, start=1)), app, flower_run_id)
        context = Context(flower_run_id, 0, {}, RecordDict(), {"run-dir": str(directory.path)})
        server_app(network, context)
    return directory


@contextmanager
def _workers(
    config: Config, task: Task, directory: RunDirectory, shares: Mapping[str, SiteData]
) -> Iterator[list[str]]:
    """Every site's worker, linked directly; yields the sites' names."""
    secure = config.secure_aggregation
    trust_anchors = anchors(shares, secure.min_sites) if secure.enabled else {}
    if trust_anchors:
        # Only the sites that contributed to a stored sum can unmask it, and those ended with the server.
        RecoveryStore(directory.path).drop()
    for site, data in shares.items():
        home = directory.sites / site
        if trust_anchors:
            # The sites of a simulation end with their server: no shares of theirs are left.
            ReplayGuard(home / FOLDER).forget()
        worker = SiteWorker(site, task, data, home, anchors=trust_anchors.get(site))
        message_relay.connect(site, DirectLink(worker))
    try:
        yield list(shares)
    finally:
        for site in shares:
            message_relay.disconnect(site)
