"""A worker whose counters over held-out examples have noise: charged, kept, stopped, and without the loss."""

from __future__ import annotations

from functools import partial

import builders
import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedge.client.requests import section_of
from fedge.client.settings import privacy_policy
from fedge.client.settings.disclosure import disclosed
from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger

TRAIN = '{"local-steps": 4, "batch-size": 8}'
OF_TRAINING, OF_METRICS = Release(1.0, 8 / 37, 4), Release(2.0)


section = partial(builders.privacy_asked, metrics="noised", metrics_noise_multiplier=2.0)


def charges(worker):
    return [e.charge for e in Ledger(worker.home / FILE).entries()]


def test_single_examples_are_hidden_and_the_release_is_charged(tell, worker, ask, weights):
    exact = dict(tell(worker, ask(protocol.EVALUATE, weights))[protocol.METRICS])
    reply = tell(worker, ask(protocol.EVALUATE, weights, privacy=section()))
    told = dict(reply[protocol.METRICS])
    spent = epsilon([OF_METRICS], 1e-5)
    assert told.pop("epsilon-consumers") == told.pop("epsilon-server") == pytest.approx(spent)
    assert told.pop("epsilon-delta") == 1e-5
    # As registered, so it tells nothing new.
    assert told.pop("num-examples") == 1
    assert set(told) == {"correct", "examples"}
    assert all(told[name] != exact[name] for name in told)
    (charge,) = charges(worker)
    assert (charge.purpose, charge.unit, charge.release) == ("evaluate", "example", OF_METRICS)
    newest = Ledger(worker.home / FILE).entries()[-1].hash
    assert reply[protocol.CONFIG][protocol.PRIVACY_LEDGER] == newest


@pytest.mark.parametrize("mechanism", ["local", "central", "central-mf"])
def test_whole_sites_are_hidden_in_shares(tell, worker, ask, weights, mechanism):
    told = dict(
        tell(worker, ask(protocol.EVALUATE, weights, privacy=section(mechanism)))[protocol.METRICS]
    )
    assert (told["num-examples"], told["examples"]) == (1, 1.0)
    assert "loss-sum" not in told
    (charge,) = charges(worker)
    assert (charge.unit, charge.release) == ("site", OF_METRICS)
    # The site's own noise, whoever adds that of the updates: the server's epsilon is finite.
    assert told["epsilon-server"] == pytest.approx(epsilon([OF_METRICS], 1e-5))


@pytest.mark.slow
def test_the_noise_is_as_much_as_is_charged(tell, worker, ask, weights):
    exact = dict(tell(worker, ask(protocol.EVALUATE, weights))[protocol.METRICS])
    asked = [
        ask(protocol.EVALUATE, weights, server_round=n, privacy=section()) for n in range(1, 81)
    ]
    made = [dict(tell(worker, one)[protocol.METRICS]) for one in asked]
    noise = np.array([one[name] - exact[name] for one in made for name in ("correct", "examples")])
    wanted = (2.0 * np.sqrt(2)) ** 2
    assert abs(noise.var() - wanted) < 3 * wanted * np.sqrt(2 / noise.size)
    assert abs(noise.mean()) < 4 * np.sqrt(wanted / noise.size)
    assert len(charges(worker)) == 80


def test_without_noise_nothing_is_charged(tell, worker, ask, weights):
    plain = section(metrics="unprotected", **{"metrics-noise-multiplier": None})
    told = dict(tell(worker, ask(protocol.EVALUATE, weights, privacy=plain))[protocol.METRICS])
    assert told == dict(tell(worker, ask(protocol.EVALUATE, weights))[protocol.METRICS])
    assert not (worker.home / FILE).exists()


def test_where_nobody_evaluates_a_request_to_is_refused(tell, worker, ask, weights):
    off = section(metrics="off", **{"metrics-noise-multiplier": None})
    found = tell(worker, ask(protocol.EVALUATE, weights, privacy=off))
    assert isinstance(found, SiteError)
    assert found.message.startswith("privacy.metrics: must be noised or unprotected")


def test_noise_of_many_sites_together_needs_their_masks(tell, worker, ask, weights):
    found = tell(worker, ask(protocol.EVALUATE, weights, privacy=section("distributed")))
    assert isinstance(found, SiteError)
    assert "distributed under secure aggregation only" in found.message
    assert not (worker.home / FILE).exists()


def test_a_redone_round_gets_both_replies_again(tell, task, data, worker, ask, weights):
    train = ask(protocol.TRAIN, weights, privacy=section(), train=TRAIN)
    evaluate = ask(protocol.EVALUATE, weights, privacy=section())
    first = [tell(worker, one) for one in (train, evaluate)]
    # The server was killed before it committed; meanwhile the site's worker too.
    again = SiteWorker("site-1", task, data, worker.home)
    for before, request in zip(first, (train, evaluate), strict=True):
        after = tell(again, request)
        assert dict(after[protocol.METRICS]) == dict(before[protocol.METRICS])
        assert dict(after[protocol.CONFIG]) == dict(before[protocol.CONFIG])
    assert [c.purpose for c in charges(worker)] == ["train", "evaluate"]


def test_the_budget_stops_an_evaluation_and_not_the_training(
    tell, task, data, ask, weights, tmp_path
):
    little = section(**{"metrics-noise-multiplier": 0.8})
    both = epsilon([OF_TRAINING, Release(0.8)], 1e-5)
    twice = epsilon([Release(1.0, 8 / 37, 8)], 1e-5)
    assert twice < both
    policy = PrivacyPolicy(epsilon=(twice + both) / 2)
    worker = SiteWorker("site-1", task, data, tmp_path, privacy=lambda: policy)
    tell(worker, ask(protocol.TRAIN, weights, privacy=section(), train=TRAIN))
    found = tell(worker, ask(protocol.EVALUATE, weights, privacy=little))
    assert isinstance(found, SiteError)
    assert found.code == 427
    after = tell(
        worker, ask(protocol.TRAIN, weights, server_round=2, privacy=section(), train=TRAIN)
    )
    assert not isinstance(after, SiteError)
    assert [c.purpose for c in charges(worker)] == ["train", "train"]


def test_noise_off_the_grid_is_refused_before_it_is_charged(tell, worker, ask, weights):
    tiny = section(**{"metrics-noise-multiplier": 1e-4})
    found = tell(worker, ask(protocol.EVALUATE, weights, privacy=tiny))
    assert isinstance(found, SiteError)
    assert (found.code, found.message[:26]) == (414, "privacy: noise on counters")
    assert not (worker.home / FILE).exists()


def test_a_task_that_standardises_needs_a_word_on_it(tell, worker, ask, weights):
    found = tell(worker, ask(protocol.EVALUATE, weights, privacy=section(statistics="off")))
    assert isinstance(found, SiteError)
    assert found.message.startswith("privacy.statistics: must be unprotected")


def test_an_owner_who_requires_privacy_lets_noised_counters_leave():
    policy = PrivacyPolicy(required=True)

    def allow(text):
        read = section_of(ConfigRecord({protocol.PRIVACY: text}))
        given = disclosed(protocol.EVALUATE, read, masked=False) or {}
        privacy_policy.allow(policy, protocol.EVALUATE, read, given)

    allow(section(statistics="off"))
    exact = section(metrics="unprotected", statistics="off", **{"metrics-noise-multiplier": None})
    with pytest.raises(SiteError, match="evaluate: must be left out .* or noised") as caught:
        allow(exact)
    assert caught.value.code == 418
