"""A worker under differential privacy: what it tells and what not, in clear and under masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import privacy_asked as section

from fedge.client import requests
from fedge.client.privacy.charging import ChargedReplies
from fedge.client.privacy.noise_calibration import noise_within
from fedge.client.privacy.noising import NoisedTraining, Round
from fedge.client.settings.privacy_policy import PrivacyPolicy, simulated
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.config.sections import TrainSection
from fedge.shared.errors import SiteError
from fedge.shared.preprocessing.steps import Scale
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.secagg import messages


def arrays(reply):
    return {k: a.numpy() for k, a in reply[protocol.ARRAYS].items()}


def test_a_private_reply_tells_what_was_spent_and_no_loss(tell, worker, ask, weights):
    request = ask(
        protocol.TRAIN, weights, privacy=section(), train='{"local-steps": 4, "batch-size": 8}'
    )
    reply = tell(worker, request)
    spent = epsilon([Release(1.0, 8 / 37, 4)], 1e-5)
    assert dict(reply[protocol.METRICS]) == {
        "num-examples": 37,
        "epsilon-consumers": pytest.approx(spent),
        # The server does not see which examples were drawn either.
        "epsilon-server": pytest.approx(spent),
        "epsilon-delta": 1e-5,
    }
    trained = arrays(reply)
    assert list(trained) == list(weights)
    assert all(not np.array_equal(a, weights[k]) for k, a in trained.items())
    # Asked again, the same; in another round, other noise.
    assert all(np.array_equal(a, trained[k]) for k, a in arrays(tell(worker, request)).items())
    assert len(Ledger(worker.home / FILE).entries()) == 1


def test_without_noise_nothing_is_charged(tell, worker, ask, weights):
    tell(worker, ask(protocol.TRAIN, weights))
    assert not (worker.home / FILE).exists()


def test_a_round_beyond_the_budget_is_refused_untrained(tell, task, data, ask, weights, tmp_path):
    policy = PrivacyPolicy(epsilon=epsilon([Release(1.0, 8 / 37, 4)], 1e-5) * 1.01)
    worker = SiteWorker("site-1", task, data, tmp_path, privacy=lambda: policy)
    train = '{"local-steps": 4, "batch-size": 8}'
    tell(worker, ask(protocol.TRAIN, weights, privacy=section(), train=train))
    found = tell(
        worker, ask(protocol.TRAIN, weights, server_round=2, privacy=section(), train=train)
    )
    assert isinstance(found, SiteError)
    assert found.code == 427
    assert len(Ledger(tmp_path / FILE).entries()) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"privacy": section(statistics="off")}, "privacy.statistics: must be unprotected"),
        ({"privacy": section(), "loss_at": "received"}, "loss-at: must be running"),
        (
            {"privacy": section(), "train": '{"mixed-precision": "bfloat16"}'},
            "mixed-precision: must be off",
        ),
        ({"privacy": '{"mechanism": "example"}'}, "privacy"),
    ],
)
def test_what_would_tell_more_than_is_charged_is_refused(tell, worker, ask, weights, changes, says):
    found = tell(worker, ask(protocol.TRAIN, weights, **changes))
    assert isinstance(found, SiteError)
    assert found.code == 414
    assert found.message.startswith(says)
    assert not (worker.home / FILE).exists()


def test_control_variates_are_refused(tell, worker, ask, weights):
    both = weights | {f"control/{k}": np.zeros_like(a) for k, a in weights.items()}
    found = tell(
        worker, ask(protocol.TRAIN, both, control=True, accepted_round=0, privacy=section())
    )
    assert isinstance(found, SiteError)
    assert "control: must be false under differential privacy" in found.message


def test_a_task_that_learns_no_statistics_needs_no_word_on_them(
    tell, task, data, ask, weights, tmp_path
):
    plain = SiteWorker("a", replace(task, preprocessing=(Scale(0.5),)), data, tmp_path)
    reply = tell(plain, ask(protocol.TRAIN, weights, privacy=section(statistics="off")))
    assert protocol.EPSILON_SERVER in reply[protocol.METRICS]


@pytest.mark.slow
def test_each_site_finds_the_noise_that_keeps_its_run_within_epsilon(tell, worker, ask, weights):
    asked = {"train": '{"local-steps": 4, "batch-size": 8}', "rounds": 3}
    wanted = section(noise_multiplier=None, epsilon=2.0, delta=1e-3)
    for number in (1, 2, 3):
        tell(worker, ask(protocol.TRAIN, weights, server_round=number, privacy=wanted, **asked))
    releases = [entry.charge.release for entry in Ledger(worker.home / FILE).entries()]
    assert {(r.sampling_rate, r.steps) for r in releases} == {(8 / 37, 4)}
    assert 0.99 * 2.0 < epsilon(releases, 1e-3) <= 2.0
    # With fewer examples each is drawn more often, and needs more noise.
    settings = TrainSection.model_validate({"batch-size": 8, "local-steps": 4})
    fewer = noise_within(2.0, 1e-3, 1.0, settings, 20, 3)
    assert fewer.noise_multiplier > releases[0].noise_multiplier


@pytest.mark.parametrize(
    ("values", "rounds"), [({"epsilon": 1e-5, "delta": 1e-10}, 3), ({"epsilon": 2.0}, None)]
)
def test_an_epsilon_without_noise_for_it_is_refused(tell, worker, ask, weights, values, rounds):
    wanted = section(noise_multiplier=None, **values)
    found = tell(worker, ask(protocol.TRAIN, weights, privacy=wanted, rounds=rounds))
    assert isinstance(found, SiteError) and found.code == 414
    assert not (worker.home / FILE).exists()


@pytest.mark.slow
def test_a_run_and_its_noised_evaluations_are_within_epsilon(tell, worker, ask, weights):
    settings = {"train": '{"local-steps": 4, "batch-size": 8}'}
    wanted = section(
        noise_multiplier=None, epsilon=3.0, metrics="noised", metrics_noise_multiplier=4.0
    )
    for number in (1, 2, 3):
        common = {"server_round": number, "privacy": wanted, "rounds": 3, "evaluate_every": 2}
        tell(worker, ask(protocol.TRAIN, weights, **common, **settings))
        if number > 1:
            tell(worker, ask(protocol.EVALUATE, weights, **common))
    charges = [entry.charge for entry in Ledger(worker.home / FILE).entries()]
    assert [c.purpose for c in charges].count("evaluate") == 2
    assert 0.99 * 3 < epsilon([c.release for c in charges], 1e-5) <= 3


@pytest.mark.slow
def test_where_nothing_is_said_every_round_is_evaluated(tell, task, data, ask, weights, tmp_path):
    found = []
    for every in (None, 1, 3):
        worker = SiteWorker("a", task, data, tmp_path / str(every))
        wanted = section(
            **{
                "noise-multiplier": None,
                "epsilon": 3.0,
                "metrics": "noised",
                "metrics-noise-multiplier": 4.0,
            }
        )
        tell(worker, ask(protocol.TRAIN, weights, privacy=wanted, rounds=3, evaluate_every=every))
        (entry,) = Ledger(worker.home / FILE).entries()
        found.append(entry.charge.release.noise_multiplier)
    assert found[0] == found[1] > found[2]


@pytest.mark.parametrize("every", [0, "1", 2.0])
def test_evaluations_beyond_epsilon_are_refused(tell, worker, ask, weights, every):
    values = {"noise-multiplier": None, "epsilon": 1.0, "metrics": "noised"}
    wanted = section(**values, **{"metrics-noise-multiplier": 2.0})
    found = tell(worker, ask(protocol.TRAIN, weights, privacy=wanted, rounds=5))
    assert isinstance(found, SiteError) and found.code == 414
    assert (
        "5 evaluations with metrics-noise-multiplier 2 cost by themselves, got 1" in found.message
    )
    enough = section(**values, **{"metrics-noise-multiplier": 50.0})
    found = tell(
        worker, ask(protocol.TRAIN, weights, privacy=enough, rounds=5, evaluate_every=every)
    )
    assert isinstance(found, SiteError) and found.message.startswith("evaluate-every")
    assert not (worker.home / FILE).exists()


def test_a_task_that_does_not_fit_is_refused_uncharged(tell, task, data, ask, weights, tmp_path):
    def summed(logits, labels):
        return task.loss(logits, labels) * len(labels)

    worker = SiteWorker("a", replace(task, loss=summed), data, tmp_path)
    found = tell(worker, ask(protocol.TRAIN, weights, privacy=section()))
    assert isinstance(found, SiteError) and found.code == 414
    assert "the loss must be a mean over" in found.message
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(("multiplier", "says"), [(0.01, "noise of one site"), (1.0, None)])
def test_distributed_noise_that_fits_no_grid_is_refused_uncharged(
    tell, task, data, ask, weights, tmp_path, multiplier, says
):
    ledger = ChargedReplies(tmp_path, simulated)
    message = ask(protocol.TRAIN, weights)
    message.content[messages.SECURE] = messages.record({messages.MIN_SITES: 5})
    config = requests.config_of(message.content, "blobs")
    noised = PrivacySection.model_validate(
        {"mechanism": "distributed", "noise-multiplier": multiplier}
    )
    of = Round(
        message.content, requests.terms(config, 2), noised, config, requests.training(config), None
    )
    work = NoisedTraining(task, ledger)
    if says is None:
        noise, charge = work.noise(of, weights)
        charge()
        assert noise.honest == 5
        return
    with pytest.raises(SiteError, match=says) as caught:
        work.noise(of, weights)
    assert caught.value.code == 414
    assert not (tmp_path / FILE).exists()
