"""A run under differential privacy, and what the sites' own ledgers hold of it.

Used by published_heart_dp.py and published_mnist_dp.py. A simulated site has no owner, so that its ledger has another
delta than the tables: epsilon at a table's delta is computed again from the releases that the ledger holds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedge.server.runs.listener import Listener
from fedge.shared.config.federation import Config
from fedge.shared.privacy.accounting import epsilon as accounting
from fedge.shared.privacy.accounting.charges import Entry
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.simulations.engine import simulate


@dataclass(frozen=True)
class Account:
    """Privacy budget that one site has spent in one run.

    Attributes:
        epsilon: of all releases in the site's ledger, at the table's delta; a site's examples are hidden from the
            server and from model consumers alike, so it is one number.
        accountant: which one computed it.
        charges: in the ledger, one a round.
        steps: of all charges.
        sampling_rate: of each step.
        noise_multiplier: of each step.
        told_epsilon: epsilon that the site reported after the last round, from rounds.jsonl.
        told_delta: at which the site computed that.
    """

    epsilon: float
    accountant: str
    charges: int
    steps: int
    sampling_rate: float
    noise_multiplier: float
    told_epsilon: float
    told_delta: float

    def to_json(self) -> dict[str, Any]:
        """The account as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        accuracy: at each site after the last round, over its held-out examples.
        by_round: the same after each evaluated round, the last one included.
        accounts: of each site.
    """

    accuracy: dict[str, float]
    by_round: list[dict[str, float]]
    accounts: dict[str, Account]


def run(config: Config, delta: float, listener: Listener | None = None) -> Run:
    """Run a federation with ``mechanism = "example"`` through the engine, and read its books.

    Args:
        config: what to run.
        delta: at which epsilon is computed.
        listener: called for every round.

    Raises:
        FedgeError: the run's.
        ValueError: a round went without a site, or a ledger differs from the run's record.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        directory = simulate(config, out, listener=listener)
        lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
        require_all_sites(lines)
        charges = lines[-1]["privacy"]
        by_round = [
            {site: values["accuracy"] for site, values in line["metrics"]["per_site"].items()}
            for line in lines
            if "per_site" in line["metrics"]
        ]
        accounts = {
            site: account(
                Ledger(directory.sites / site / FILE).entries(), charges[site]["consumers"], delta
            )
            for site in charges
        }
        return Run(by_round[-1], by_round, accounts)


def require_all_sites(lines: Sequence[Mapping[str, Any]]) -> None:
    """Hold a run against the tables' protocol: every site takes part in every round.

    Args:
        lines: of rounds.jsonl, one or more.

    Raises:
        ValueError: a round was skipped, or went without a site.
    """
    everyone = lines[0]["invited"]
    for line in lines:
        counted = line["trained"] if line["outcome"] == "committed" else []
        if sorted(counted) != sorted(everyone):
            raise ValueError(
                f"round {line['round']}: must count {', '.join(everyone)}, got {', '.join(counted) or 'none'}"
            )


def account(entries: Sequence[Entry], reported: float, delta: float) -> Account:
    """Account the entries of a ledger.

    Args:
        entries: of one run's training, with the same noise and sampling rate throughout.
        reported: epsilon that the site reported after the last of them.
        delta: at which epsilon is computed.

    Raises:
        ValueError: the entries are not of one kind, or end at another epsilon than was reported.
    """
    kinds = {
        (e.charge.unit, e.charge.release.noise_multiplier, e.charge.release.sampling_rate)
        for e in entries
    }
    if len(kinds) != 1:
        raise ValueError(f"ledger: must hold releases of one kind, got {len(kinds)}")
    ((unit, noise_multiplier, sampling_rate),) = kinds
    if unit != "example":
        raise ValueError(f"unit: must be example, got {unit}")
    last = entries[-1]
    if not last.epsilon_consumers == last.epsilon_server == reported:
        raise ValueError(
            f"ledger: must end at the reported epsilon, {reported}, got {last.epsilon_consumers} against consumers"
            f" and {last.epsilon_server} against the server"
        )
    releases = [e.charge.release for e in entries]
    return Account(
        epsilon=accounting.epsilon(releases, delta),
        accountant=accounting.accountant(releases),
        charges=len(releases),
        steps=sum(release.steps for release in releases),
        sampling_rate=sampling_rate,
        noise_multiplier=noise_multiplier,
        told_epsilon=reported,
        told_delta=last.epsilon_delta,
    )


def versions() -> dict[str, str]:
    """Versions of the packages that compute the tables under differential privacy."""
    packages = ("fedge", "flwr", "torch", "opacus", "dp-accounting", "numpy")
    return {name: version(name) for name in packages}
