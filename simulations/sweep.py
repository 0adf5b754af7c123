"""A sweep: one configuration trained under several noise multipliers, with the accuracy and epsilon of each.

Every run is an ordinary simulation in a folder of its own, so that finished runs are kept when the sweep is
continued. Figures are exact (metrics ``unprotected``): a sweep is for choosing the noise on one's own data.
"""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final, TypeAlias

import tomli_w

from fedge.server.report.page.render import write as write_report
from fedge.server.runs.directory import RunDirectory, state_of
from fedge.server.runs.listener import NullListener
from fedge.shared.config.federation import Config
from fedge.shared.config.privacy import Unit
from fedge.shared.config.reader import Tree, dump, from_tree
from fedge.shared.errors import FedgeError
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.tasks.registry import get_task

NAME: Final = "sweep.json"

#: Called with (name of the run, rounds done, rounds in all).
ProgressListener: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One run of a sweep: in folder ``runs/name``, without noise where ``noise_multiplier`` is None."""

    name: str
    noise_multiplier: float | None
    config: Config


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        job: the run.
        id: fedge's id of it, empty where it never began.
        value: the metric after the last round, pooled over the sites' held-out examples; None where there is none.
        epsilon: largest over the sites, against model consumers and against the server; the latter is infinite
            where the server gets the updates without noise; None where the run failed.
        problem: why there is no value, with the number of the error.
    """

    job: Job
    id: str = ""
    value: float | None = None
    epsilon: tuple[float, float] | None = None
    problem: str = ""


def jobs(tree: Tree, noise_multipliers: Sequence[float], seeds: int) -> list[Job]:
    """The runs: one without noise, then each noise multiplier with each seed.

    Args:
        tree: a configuration with a mechanism; its noise multiplier and metrics are replaced.
        noise_multipliers: in the order of the runs.
        seeds: how many, counted up from the configuration's.

    Raises:
        ConfigError: 201 or 202, the configuration is not allowed with one of these multipliers.
    """
    runs: list[Job] = []
    for noise in noise_multipliers:
        config = _noised(tree, noise)
        if not runs:
            runs.append(Job("baseline", None, _plain(tree)))
        for i in range(seeds):
            seed = config.run.seed + i
            name = f"noise-{repr(noise).removesuffix('.0')}-seed-{seed}"
            runs.append(Job(name, noise, _noised(tree, noise, seed)))
    return runs


def _noised(tree: Tree, noise_multiplier: float, seed: int | None = None) -> Config:
    changed = deepcopy(tree)
    section = changed.get("privacy")
    if isinstance(section, dict):
        section |= {"noise-multiplier": noise_multiplier, "metrics": "unprotected"}
        for key in ("metrics-noise-multiplier", "epsilon", "delta"):
            section.pop(key, None)
    if seed is not None:
        changed.setdefault("run", {})["seed"] = seed
    return from_tree(changed)


def _plain(tree: Tree) -> Config:
    return from_tree({**deepcopy(tree), "privacy": {}})


def base_of(config: Config) -> str:
    """Base configuration of a sweep as TOML: that of its first noised run, without the noise multiplier."""
    tree = tomllib.loads(dump(config))
    del tree["privacy"]["noise-multiplier"]
    return tomli_w.dumps(tree)


class _Rounds(NullListener):
    """Reports a run's rounds."""

    def __init__(self, name: str, total: int, progress: ProgressListener) -> None:
        self._name, self._total, self._progress = name, total, progress

    def round(self, line: dict[str, Any]) -> None:
        """A round is committed."""
        self._progress(self._name, line["round"], self._total)


def run(
    all_jobs: Sequence[Job], folder: Path, delta: float, progress: ProgressListener
) -> list[Outcome]:
    """Run the missing jobs one after the other; a run that fails does not stop the others.

    Unfinished runs start again: a repeated round could be charged again, and epsilon would not be that of the
    mechanism.

    Args:
        all_jobs: from ``jobs``.
        folder: of the sweep.
        delta: at which epsilon is computed.
        progress: called after each round.
    """
    # Imported here, so that a configuration is refused without torch.
    from fedge.simulations.engine import simulate

    outcomes = []
    for i, job in enumerate(all_jobs, 1):
        directory = RunDirectory(folder / "runs" / job.name)
        name = f"{job.name} ({i} of {len(all_jobs)})"
        total = job.config.run.rounds
        if kept := state_of(directory.path) == "finished":
            progress(f"{name}, kept", total, total)
        else:
            progress(name, 0, total)
            shutil.rmtree(directory.path, ignore_errors=True)
        try:
            # A finished run is checked against its journal, and not run again.
            listener = _Rounds(name, total, progress)
            simulate(job.config, directory.path, resume=kept, listener=listener)
            outcomes.append(_outcome(job, directory, delta))
        except FedgeError as error:
            outcomes.append(Outcome(job, problem=str(error)))
    return outcomes


def _outcome(job: Job, directory: RunDirectory, delta: float) -> Outcome:
    results = json.loads(directory.metrics.read_text(encoding="utf-8"))
    value = results["final"]["pooled"].get(_metric(job.config))
    if value is None:
        return Outcome(job, results["run"], problem="no site's held-out examples were counted")
    if job.noise_multiplier is None:
        return Outcome(job, results["run"], value)
    epsilon = spent(directory, job.config.privacy.unit, delta)
    if epsilon is None:
        return Outcome(job, results["run"], problem="no site's ledger holds a charge")
    return Outcome(job, results["run"], value, epsilon)


def _metric(config: Config) -> str:
    return get_task(config.task.name).metrics[0].name


def spent(directory: RunDirectory, unit: Unit, delta: float) -> tuple[float, float] | None:
    """Epsilon that a run has spent by the ledgers of its sites.

    Args:
        directory: of the run.
        unit: of privacy.
        delta: at which epsilon is computed.

    Returns:
        The largest epsilon against model consumers, and against the server; None where no site was charged.
    """
    from fedge.client.settings.privacy_policy import simulated

    account = simulated().study
    ledgers = [Ledger(path) for path in sorted(directory.sites.glob(f"*/{FILE}"))]
    totals = [ledger.spent(account, unit, delta) for ledger in ledgers]
    totals = [total for total in totals if total.charges]
    if not totals:
        return None
    return max(t.consumers for t in totals), max(t.server for t in totals)


def to_json(outcomes: Sequence[Outcome], delta: float) -> dict[str, Any]:
    """The sweep as plain JSON values; an epsilon that nothing bounds is null.

    Args:
        outcomes: from ``run``: the one without noise, then the others.
        delta: at which epsilon was computed.
    """
    baseline, *noised = outcomes
    config = noised[0].job.config
    multipliers = dict.fromkeys(o.job.noise_multiplier for o in noised)
    return {
        "task": config.task.name,
        "mechanism": config.privacy.mechanism,
        "unit": config.privacy.unit,
        "delta": delta,
        "metric": _metric(config),
        "rounds": config.run.rounds,
        "seeds": list(dict.fromkeys(o.job.config.run.seed for o in noised)),
        "baseline": _trial(baseline),
        "points": [
            {"noise_multiplier": m} | _point([o for o in noised if o.job.noise_multiplier == m])
            for m in multipliers
        ],
    }


def _point(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The seeds of a noise multiplier together, without the failed ones."""
    values = [o.value for o in outcomes if o.value is not None]
    pairs = [o.epsilon for o in outcomes if o.epsilon is not None]
    largest = tuple(max(side) for side in zip(*pairs, strict=True)) if pairs else None
    return {
        "epsilon": _epsilon_json(largest),
        "mean": fmean(values) if values else None,
        "lowest": min(values, default=None),
        "highest": max(values, default=None),
        "runs": [_trial(o) | {"epsilon": _epsilon_json(o.epsilon)} for o in outcomes],
    }


def _trial(outcome: Outcome) -> dict[str, Any]:
    return {
        "run": outcome.job.name,
        "id": outcome.id,
        "seed": outcome.job.config.run.seed,
        "value": outcome.value,
        "problem": outcome.problem or None,
    }


def _epsilon_json(epsilon: tuple[float, ...] | None) -> dict[str, float | None]:
    pair = epsilon or (math.inf, math.inf)
    finite = (value if math.isfinite(value) else None for value in pair)
    return dict(zip(("consumers", "server"), finite, strict=True))


def attach_to_runs(outcomes: Sequence[Outcome], sweep: dict[str, Any], folder: Path) -> None:
    """Write the sweep to the directory of each run that has a report, and render that report again.

    Args:
        outcomes: from ``run``.
        sweep: from ``to_json``.
        folder: of the sweep.

    Raises:
        OSError: a run's folder cannot be written.
    """
    for outcome in outcomes:
        directory = RunDirectory(folder / "runs" / outcome.job.name)
        if not directory.run.is_file():
            continue
        directory.write_json(directory.path / NAME, sweep)
        write_report(directory.path)
