"""Who takes part: nodes register as sites, once a run, and their word of size binds them."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedge.server.admission import admit_registration
from fedge.server.exchange import exchange
from fedge.server.journal import Journal
from fedge.server.verdicts import Bound, Registration, Rejection
from fedge.shared import preprocess, protocol
from fedge.shared.config import Config
from fedge.shared.errors import RunError
from fedge.shared.preprocess import OneHot, Standardise
from fedge.shared.tasks.task import Task

_log = logging.getLogger(__name__)
_PAUSE = 0.5


@dataclass(frozen=True)
class Member:
    """A registered site.

    Attributes:
        node_id: Flower's, in this Flower run.
        train_examples, test_examples: the most that it may report, in any round.
    """

    site: str
    node_id: int
    train_examples: int
    test_examples: int


def column_bounds(task: Task) -> tuple[Bound, ...]:
    """For each column that reaches ``Standardise``, within what its mean must lie; empty where there is none."""
    if not preprocess.learns(task.preprocessing):
        return ()
    bounds = [Bound(f.name, f.low, f.high) for f in task.input.features]
    for step in task.preprocessing:
        match step:
            case OneHot(columns):
                kept = [b for i, b in enumerate(bounds) if i not in {index for index, _ in columns}]
                bounds = kept + [
                    Bound(f"{bounds[index].name} {category:g}", 0.0, 1.0)
                    for index, categories in columns
                    for category in categories[1:]
                ]
            case Standardise():
                break
            case _:
                pass
    return tuple(bounds)


def take(
    grid: Grid, config: Config, task: Task, run_id: str, journal: Journal, flower_run_id: int
) -> tuple[dict[str, Member], list[Rejection]]:
    """Register every node that the grid knows, and wait for as many as the configuration names.

    Returns:
        Members by site, in name order, and refused registrations.

    Raises:
        RunError: 501, fewer than ``round.min-sites`` before the deadline; 502, a required site is missing.
    """
    wanted = config.sites.count if config.data.partition != "natural" else config.round.min_sites
    needed = max(wanted, config.round.min_sites)
    deadline = time.monotonic() + config.round.deadline
    admitted: dict[str, tuple[int, Registration]] = {}
    refused: dict[int, Rejection] = {}
    while True:
        known = {node for node, _ in admitted.values()} | set(refused)
        new = sorted(set(grid.get_node_ids()) - known)
        left = deadline - time.monotonic()
        if new and left > 0:
            _register(grid, new, left, config, task, run_id, journal, admitted, refused)
        if len(admitted) >= needed or left <= 0:
            break
        if len(admitted) + len(refused) >= needed:
            # Everybody who was expected has spoken; those refused will not improve by waiting.
            break
        time.sleep(min(_PAUSE, max(left, 0.0)))
    for site, rejection in dominant(
        admitted, journal.sites(), config.admission.max_size_ratio
    ).items():
        refused[admitted.pop(site)[0]] = rejection
        _log.warning("%s refused: FE-%d %s", site, rejection.code, rejection.reason)
    for site, (_, r) in sorted(admitted.items()):
        journal.add_site(site, r.train_examples, r.test_examples)
    members = {
        site: Member(site, node, r.train_examples, r.test_examples)
        for site, (node, r) in sorted(admitted.items())
    }
    _log.info(
        "Flower run %s: %d sites registered, %d refused", flower_run_id, len(members), len(refused)
    )
    if missing := sorted(set(config.round.require_sites) - set(members)):
        raise RunError(502, f"round.require-sites: must be registered, got no {', '.join(missing)}")
    if len(members) < config.round.min_sites:
        why = "; ".join(f"{r.site}: {r.reason}" for r in refused.values())[:300]
        raise RunError(
            501,
            f"sites: must be at least {config.round.min_sites}, got {len(members)} {why}".rstrip(),
        )
    if journal.run_preprocessing_missing():
        parts = [r.statistics for _, (_, r) in sorted(admitted.items()) if r.statistics is not None]
        steps = (
            preprocess.fitted(task.preprocessing, preprocess.pooled(parts).standardise())
            if parts
            else task.preprocessing
        )
        journal.fix_preprocessing([step.to_json() for step in steps])
    return members, list(refused.values())


def _register(
    grid: Grid,
    nodes: Sequence[int],
    deadline: float,
    config: Config,
    task: Task,
    run_id: str,
    journal: Journal,
    admitted: dict[str, tuple[int, Registration]],
    refused: dict[int, Rejection],
) -> None:
    requests = [
        Message(
            RecordDict(
                {
                    protocol.CONFIG: ConfigRecord(
                        {
                            protocol.RUN_ID: run_id,
                            protocol.SERVER_ROUND: 0,
                            protocol.TASK: task.name,
                            protocol.STANDARDISE: config.data.standardise,
                        }
                    )
                }
            ),
            dst_node_id=node,
            message_type=protocol.REGISTER,
            ttl=deadline + 60,
        )
        for node in nodes
    ]
    replies = exchange(grid, requests, deadline).replies
    before = journal.sites()
    bounds = column_bounds(task) if config.data.standardise == "federated" else ()
    for node in nodes:
        if node not in replies:
            continue
        result = admit_registration(replies[node], f"node {node}", run_id, config.admission, bounds)
        if isinstance(result, Registration):
            result = _known(result, before, admitted)
        if isinstance(result, Rejection):
            refused[node] = result
            _log.warning("%s refused: FE-%d %s", result.site, result.code, result.reason)
            continue
        admitted[result.site] = (node, result)


def dominant(
    admitted: Mapping[str, tuple[int, Registration]], before: Mapping[str, object], ratio: float
) -> dict[str, Rejection]:
    """New sites that would outweigh the others by what they say of themselves.

    A site's weight is bounded by what it registers, so that word must be bounded too: by the others'.
    Fewer than three sites, and sites that the run already knows, are left alone.
    """
    sizes = {site: r.train_examples for site, (_, r) in admitted.items()}
    found: dict[str, Rejection] = {}
    for site in sorted(sizes, key=lambda s: (-sizes[s], s)):
        others = [n for other, n in sizes.items() if other != site and other not in found]
        if len(others) < 2 or site in before:
            continue
        bound = int(ratio * statistics.median(others))
        if sizes[site] > bound:
            found[site] = Rejection(
                site,
                412,
                "rejected",
                f"examples: must be at most {bound} ({ratio:g} medians of the other sites, "
                f"admission.max-size-ratio), got {sizes[site]}",
            )
    return found


def _known(
    registration: Registration,
    before: dict[str, tuple[int, int]],
    admitted: dict[str, tuple[int, Registration]],
) -> Registration | Rejection:
    site = registration.site
    if site in admitted:
        return Rejection(site, 412, "duplicate", f"site: must be unique, got a second {site}")
    now = (registration.train_examples, registration.test_examples)
    if before.get(site, now) != now:
        then = "{} to train and {} to test".format(*before[site])
        return Rejection(
            site, 412, "rejected", f"examples: must be {then} as before, got {now[0]} and {now[1]}"
        )
    return registration
