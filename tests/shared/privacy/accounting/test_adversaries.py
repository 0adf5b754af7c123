"""Epsilon by unit: the neighbours of a site's noise and of an example's are not the same."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedge.shared.privacy.accounting.adversaries import account, of_entries, of_study
from fedge.shared.privacy.accounting.charges import Budget, Charge, Entry
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger.ledger import FILE, Ledger

DELTA = 1e-5
ONE = (1.0, 1.0, False, 1)


def entries(path: Path, rounds: int, release: Release) -> list[Entry]:
    ledger = Ledger.create(path / FILE)
    for number in range(1, rounds + 1):
        values = ("r-1", number, "train", 0, "local", release, DELTA, f"{number:064x}")
        ledger.charge(Charge("heart", "site", *values), Budget(1e6, DELTA))  # type: ignore[arg-type]
    return ledger.entries("heart")


@pytest.mark.parametrize(("rounds", "site", "example"), [(1, 4.37718, 9.99726), (10, 17.86, 46.2)])
def test_noise_that_hides_a_site_costs_its_examples_as_half_of_it(
    tmp_path: Path, rounds: int, site: float, example: float
) -> None:
    """Multiplier 1: an example moves the clipped update by up to twice the bound, so 9.997 and not 4.38."""
    charged = entries(tmp_path, rounds, Release(1.0))
    assert of_entries(charged, "site", DELTA)[0] == pytest.approx(site, rel=2e-3)
    assert of_entries(charged, "example", DELTA)[0] == pytest.approx(example, rel=2e-3)
    ledger = Ledger(tmp_path / FILE)
    assert ledger.spent("heart", "example", DELTA).consumers == pytest.approx(example, rel=2e-3)


def test_what_an_older_fedge_kept_of_mixed_charges_is_not_taken(tmp_path: Path) -> None:
    """It kept beside a charge of examples what a site's noise cost as if one example moved it by the bound alone."""
    charged = entries(tmp_path, 1, Release(1.0))
    last = replace(charged[0].charge, unit="example", release=Release(8.0))
    small = replace(charged[0], charge=last, epsilon_consumers=4.4, epsilon_server=4.4)
    assert of_entries([*charged, small], "example", DELTA)[0] > 9.99
    # Of one unit alone it is taken, which spares the accountant.
    assert of_entries([small], "example", DELTA) == (4.4, 4.4)


def test_sampling_of_sites_helps_examples_too_and_the_server_sees_it() -> None:
    sampled = ("site", "central", (1.0, 0.1, False, 10))
    consumers, server = of_study([sampled], "example", DELTA)
    assert consumers == pytest.approx(account([Release(0.5, 0.1, 10)], DELTA, "site")[0])
    assert server == math.inf


def test_examples_alone_are_as_before_and_bound_nothing_for_the_site() -> None:
    kept = [("example", "example", ONE)]
    assert of_study(kept, "example", DELTA)[0] == pytest.approx(4.37718, rel=1e-3)
    assert of_study(kept, "site", DELTA) == (math.inf, math.inf)
