"""What a table under differential privacy claims is what the sites' ledgers hold."""

import importlib
import sys
from pathlib import Path

import pytest

from fedge.shared.config.federation import Config
from fedge.shared.privacy.accounting import epsilon
from fedge.shared.privacy.accounting.charges import Budget, Charge
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger.ledger import Ledger

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
DELTA = 1e-3
SIMULATED = Budget(1e9, 1e-5, "consumers")


@pytest.fixture(scope="module")
def private():
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("published_private")
    sys.modules.pop("published_private", None)
    sys.path[:] = before


def entries(folder, *releases, unit="example"):
    """Of a real ledger with these releases, one a round."""
    ledger = Ledger.create(folder / "privacy.sqlite")
    for number, release in enumerate(releases, start=1):
        charge = Charge(
            "default", unit, "r", number, "train", 0, "example", release, 1e-5, "0" * 64
        )
        ledger.charge(charge, SIMULATED)
    return ledger.entries()


def test_epsilon_is_of_all_releases_at_the_tables_delta(private, tmp_path):
    found = entries(tmp_path, *[Release(5.0, 0.1, 100)] * 3)
    reported = found[-1].epsilon_consumers
    account = private.account(found, reported, DELTA)
    assert account.epsilon == epsilon.epsilon([Release(5.0, 0.1, 300)], DELTA)
    assert (account.charges, account.steps, account.accountant) == (3, 300, "PLD")
    assert (account.noise_multiplier, account.sampling_rate) == (5.0, 0.1)
    # The epsilon that the site reported is at its own, smaller delta, and so larger.
    assert (account.told_epsilon, account.told_delta) == (reported, 1e-5)
    assert account.epsilon < reported


def test_a_ledger_that_ends_at_another_epsilon_than_reported_is_refused(private, tmp_path):
    found = entries(tmp_path, *[Release(5.0, 0.1, 100)] * 3)
    with pytest.raises(ValueError, match="must end at the reported epsilon, 0.5, got"):
        private.account(found, 0.5, DELTA)
    # A charge that the ledger has lost.
    with pytest.raises(ValueError, match="must end at the reported epsilon"):
        private.account(found[:-1], found[-1].epsilon_consumers, DELTA)


def test_releases_of_two_kinds_are_refused(private, tmp_path):
    found = entries(tmp_path, Release(5.0, 0.1, 100), Release(6.0, 0.1, 100))
    with pytest.raises(ValueError, match="must hold releases of one kind, got 2"):
        private.account(found, found[-1].epsilon_consumers, DELTA)
    with pytest.raises(ValueError, match="must hold releases of one kind, got 0"):
        private.account([], 0.0, DELTA)


def test_another_unit_than_examples_is_refused(private, tmp_path):
    found = entries(tmp_path, Release(5.0), unit="site")
    with pytest.raises(ValueError, match="unit: must be example, got site"):
        private.account(found, found[-1].epsilon_consumers, DELTA)


def tiny():
    return Config.model_validate(
        {
            "task": {"name": "breast-cancer"},
            "run": {"rounds": 2, "evaluate-every": 2},
            "data": {"partition": "iid", "standardise": "site"},
            "sites": {"count": 2},
            "train": {"local-steps": 1, "batch-size": 4},
            "privacy": {
                "mechanism": "example",
                "noise-multiplier": 3.0,
                "metrics": "unprotected",
                "statistics": "unprotected",
            },
        }
    )


@pytest.mark.soak
def test_a_run_brings_what_the_sites_ledgers_hold(private):
    found = private.run(tiny(), DELTA)
    assert list(found.accuracy) == ["site-1", "site-2"]
    assert found.by_round == [found.accuracy]
    for account in found.accounts.values():
        release = Release(3.0, account.sampling_rate, 2)
        assert (account.charges, account.steps) == (2, 2)
        assert account.told_epsilon == epsilon.epsilon([release], 1e-5)
        assert account.epsilon == epsilon.epsilon([release], DELTA)


def line(server_round, *trained, outcome="committed"):
    return {
        "round": server_round,
        "outcome": outcome,
        "invited": ["north", "south"],
        "trained": list(trained),
    }


def test_a_run_in_which_a_site_was_left_out_is_refused(private):
    whole = [line(1, "north", "south"), line(2, "south", "north")]
    private.require_all_sites(whole)
    with pytest.raises(ValueError, match="round 3: must count north, south, got south"):
        private.require_all_sites([*whole, line(3, "south")])
    skipped = line(3, "north", "south", outcome="skipped")
    with pytest.raises(ValueError, match="round 3: must count north, south, got none"):
        private.require_all_sites([*whole, skipped])
    fewer = line(3, "north") | {"invited": ["north"]}
    with pytest.raises(ValueError, match="round 3: must count north, south, got north"):
        private.require_all_sites([*whole, fewer])
