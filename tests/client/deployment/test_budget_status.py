"""The budget in a site's status: what is spent of it, and what stands in the way of reading it."""

from __future__ import annotations

import pytest

from fedge.client.deployment import budget_status
from fedge.client.settings import policy_writer
from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.shared.privacy.accounting.charges import Budget, Charge
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger

TWO = Release(2.0)


def charge(ledger, mechanism="example", release=TWO, study="heart", unit="example"):
    digest = "ab" * 32
    one = Charge(study, unit, "r-1", 1, "train", 0, mechanism, release, 1e-5, digest)
    return ledger.charge(one, Budget(100, 1e-5, "consumers"))


@pytest.fixture
def home(tmp_path):
    own = PrivacyPolicy(study="heart", epsilon=8, against="consumers")
    policy_writer.write(tmp_path, tasks=["digits"], bundles=[], versions=[], privacy=own)
    return tmp_path


def test_nothing_is_told_where_nothing_was_charged(home):
    assert budget_status.spent(home) is None
    must = PrivacyPolicy(study="heart", epsilon=8, required=True)
    policy_writer.write(home, tasks=["digits"], bundles=[], versions=[], privacy=must)
    assert budget_status.lines(budget_status.spent(home)) == [
        "privacy    study heart: nothing of epsilon 8 is spent for one example or one site, against the server,"
        " at delta 1e-05"
    ]


@pytest.mark.slow
def test_each_unit_has_its_line(home):
    ledger = Ledger.create(home / FILE)
    charge(ledger, "central", Release(1.0, 0.1, 100), unit="site")
    site = budget_status.spent(home)
    assert site["spent"]["site"] == {
        "consumers": pytest.approx(7.0466, abs=1e-3),
        "server": None,
        "delta": 1e-5,
    }
    assert (
        "epsilon 7.0466 of 8 is spent for one site, against the consumers"
        in budget_status.lines(site)[0]
    )
    assert "without bound" in budget_status.lines({**site, "against": "server"})[0]
    charge(ledger)
    charge(ledger, study="another")
    found = budget_status.spent(home)
    # Noise that hides a site hides its examples as half of it does; what hides examples bounds nothing for the site.
    both = epsilon([TWO, Release(0.5, 0.1, 100)], 1e-5)
    assert found["spent"]["example"]["consumers"] == pytest.approx(both)
    assert found["spent"]["site"]["consumers"] is None
    charge(ledger, "example", Release(9.0))
    more = budget_status.spent(home)["spent"]["example"]["consumers"]
    assert more > both


def test_a_ledger_that_is_gone_is_a_problem_in_words(home):
    ledger = Ledger.create(home / FILE)
    charge(ledger)
    (home / FILE).unlink()
    assert budget_status.lines(budget_status.spent(home))[0].startswith("problem    FE-428 ")
