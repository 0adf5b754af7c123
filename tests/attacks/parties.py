"""fedge's own sites for the attacks: six ``SiteWorker``s, unchanged, with a small real task, and their roster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.client.data.dataset import SiteData
from fedge.client.secagg.session import Anchors
from fedge.client.worker.handlers import SiteWorker
from fedge.shared.models.fnn import FNN
from fedge.shared.preprocessing.schema import Feature, InputSchema, OutputSchema
from fedge.shared.roster import roster
from fedge.shared.roster.draft import Draft, RosterSite, entry_of
from fedge.shared.roster.roster import Roster
from fedge.shared.secagg.vector_layout import Bounds
from fedge.shared.tasks.classification import ACCURACY, LOSS, softmax_counters, softmax_loss
from fedge.shared.tasks.task import Table, Task

NAMES: Final = tuple(f"site-{i}" for i in range(1, 7))
VICTIM: Final = "site-3"
#: Examples of each site; the victim's are as many as in Flower's harness.
EXAMPLES: Final = dict(zip(NAMES, (40, 70, 130, 90, 25, 60), strict=True))
MIN_SITES: Final = 5
BOUNDS: Final = Bounds(10.0, 4.0, 100.0, 1000)
TODAY, LAST = date(2027, 6, 1), date(2027, 11, 30)


def _no_files(path: Path | None) -> Table:
    raise NotImplementedError


def task(network: Callable[[], torch.nn.Module] = lambda: FNN((2, 4, 2))) -> Task:
    """Two blobs in the plane."""
    return Task(
        name="blobs",
        summary="two blobs",
        input=InputSchema((2,), features=(Feature("x", -9, 9), Feature("y", -9, 9))),
        output=OutputSchema(("left", "right"), "softmax"),
        preprocessing=(),
        network=network,
        loss=softmax_loss,
        counters=softmax_counters,
        metrics=(ACCURACY, LOSS),
        load=_no_files,
    )


def private_key(name: str) -> Ed25519PrivateKey:
    """The roster key of a site; the same in every run."""
    return Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"."))


def roster_of(names: Iterable[str], **changed: RosterSite) -> Roster:
    """A signed roster of these sites; ``changed`` entries, by name with _ for -, are as given."""
    entries = {n: entry_of(private_key(n).public_key().public_bytes_raw(), LAST) for n in names}
    entries |= {n.replace("_", "-"): entry for n, entry in changed.items()}
    consortium = private_key("consortium")
    return roster.open_roster(
        roster.sign(Draft("consortium", 1, entries), consortium), consortium.public_key()
    )


def data_of(name: str, count: int) -> SiteData:
    """A site's examples, unlike every other's."""
    draw = np.random.default_rng([*name.encode()])
    labels = np.arange(count + 8) % 2
    features = (draw.normal(size=(count + 8, 2)) + 2.0 * labels[:, None]).astype(np.float32)
    return SiteData(features[:count], labels[:count], features[count:], labels[count:])


def make_sites(
    home: Path, *, known: Roster | None = None, site_task: Task | None = None, **examples: int
) -> dict[str, SiteWorker]:
    """Fresh workers.

    Args:
        home: a folder; each site has one of its own below it.
        known: the roster that all of them hold; of all names unless given.
        site_task: the task that they train; ``task()`` unless given.
        examples: of sites with other numbers than ``EXAMPLES``, by name with _ for -.
    """
    trusted = known or roster_of(NAMES)
    counts = EXAMPLES | {name.replace("_", "-"): n for name, n in examples.items()}
    return {
        name: SiteWorker(
            name,
            site_task or task(),
            data_of(name, counts[name]),
            home / name,
            anchors=Anchors(
                name, private_key(name), lambda: trusted, lambda: MIN_SITES, lambda: TODAY
            ),
        )
        for name in NAMES
    }


def weights_of(task: Task) -> dict[str, Any]:
    """The weights that a round begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {k: t.numpy().copy() for k, t in task.network().state_dict().items()}
