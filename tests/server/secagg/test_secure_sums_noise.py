"""Evaluations under masks whose counters have noise: how much there is in the sum, and what each attempt costs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedge.client.privacy import charging
from fedge.server.participants import request_content
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.privacy.mechanisms.csprng import Entropy

PRIVACY = {
    "mechanism": "distributed",
    "noise-multiplier": 1.0,
    "metrics": "noised",
    "metrics-noise-multiplier": 2.0,
    "statistics": "unprotected",
}


def evaluated(made, server_round=1):
    def compose(some, secure):
        common = request_content.settings(made.config, "r-1", server_round, (), len(some))
        return request_content.evaluate(made.arrays, common, some, made.config, secure)

    return made.sums.evaluate(server_round, made.members, compose)


def charges(made, site):
    return [e.charge for e in Ledger(made.folder / site / FILE).entries()]


def exact(made):
    """Each site's share of right answers, and its number of examples, in clear."""
    found = {}
    for site, worker in made.workers.items():
        data = worker.learner.data
        (asked,) = request_content.evaluate(
            made.arrays,
            {
                k: v
                for k, v in request_content.settings(made.config, "r-1", 1, (), 6).items()
                if k not in ("privacy", "rounds")
            },
            [m for m in made.members if m.site == site],
            made.config,
        )
        metrics = worker.answer("evaluate", asked.content)["metrics"]
        found[site] = (metrics["correct"] / len(data.test_labels), len(data.test_labels))
    return found


@pytest.fixture(autouse=True)
def noise_of_its_own(monkeypatch):
    """Sites' noise is the same each time that a test runs: the first has the key 1, the next 2."""
    keys = itertools.count(1)
    monkeypatch.setattr(charging, "Entropy", lambda: Entropy(key=next(keys).to_bytes(32, "big")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "corrupt", "variance"),
    # Of six sites' noise: three honest ones' is what is promised; without masks' help each has all of it.
    [
        pytest.param("distributed", 0, 6 / 3 * 4, marks=pytest.mark.soak),
        ("distributed", 1, 6 / 2 * 4),
        ("example", 0, 6 * 4 * 2),
    ],
)
def test_the_noise_in_the_sum(rig, mechanism, corrupt, variance):
    privacy = PRIVACY | {"mechanism": mechanism}
    if corrupt:
        privacy["corrupt-sites"] = corrupt
    made = rig(sections={"privacy": privacy})
    own = exact(made)
    weight = {s: n if mechanism == "example" else 1 for s, (_, n) in own.items()}
    wanted = sum(share * weight[s] for s, (share, _) in own.items())
    rounds = 25
    sums = []
    for number in range(1, rounds + 1):
        found, outcome = evaluated(made, number)
        assert len(outcome.sites) == 6
        assert "loss-sum" not in found
        if mechanism == "example":
            assert not float(found["examples"]).is_integer()
        else:
            assert found["examples"] == 6
        sums.append(found["correct"] - wanted)
    assert 0.3 < np.var(sums) / variance < 2.4
    assert abs(np.mean(sums)) < 4.5 * np.sqrt(variance / rounds)
    for site in made.workers:
        assert [c.purpose for c in charges(made, site)] == ["evaluate"] * rounds
        assert {c.release for c in charges(made, site)} == {Release(2.0)}
        assert {c.unit for c in charges(made, site)} == {
            "example" if mechanism == "example" else "site"
        }
        assert outcome.ledgers[site] == Ledger(made.folder / site / FILE).digest("default")


@pytest.mark.slow
def test_each_attempt_has_noise_of_its_own_and_is_charged(rig):
    made = rig(sections={"privacy": PRIVACY}, attempts=3)
    for i in range(1, 5):
        made.fault(f"site-{i}", "masked", "silent", times=1)
    found, outcome = evaluated(made)
    assert outcome.attempts == 2
    assert found is not None
    assert [c.purpose for c in charges(made, "site-6")] == ["evaluate"] * 2
    # The site's own count of one round's attempts, and another round is one more.
    evaluated(made, 2)
    assert len(charges(made, "site-6")) == 3


def test_without_noise_nothing_is_charged(rig):
    plain = {k: v for k, v in PRIVACY.items() if not k.startswith("metrics")}
    made = rig(sections={"privacy": plain | {"metrics": "unprotected"}})
    found, _ = evaluated(made)
    assert float(found["examples"]).is_integer()
    assert found["examples"] > 6
    assert "loss-sum" in found
    assert not (made.folder / "site-1" / FILE).exists()


@pytest.mark.slow
def test_too_few_sites_for_the_noise_open_nothing(rig):
    # Their own policies would do with three; the noise of two honest ones was promised by five.
    made = rig(sections={"privacy": PRIVACY}, own_min_sites=3, attempts=1, min_sites=5)
    for i in (1, 2):
        made.fault(f"site-{i}", "masked", "silent")
    found, outcome = evaluated(made)
    assert found is None
    assert outcome.sites == []
