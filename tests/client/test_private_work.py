"""A worker under differential privacy: what it tells and what not, in clear and under masks."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fedge.client.privacy_policy import PrivacyPolicy
from fedge.client.private_release import noise_within
from fedge.client.worker import SiteWorker
from fedge.shared import protocol
from fedge.shared.config import TrainSection
from fedge.shared.errors import SiteError
from fedge.shared.preprocess import Scale
from fedge.shared.privacy.accounting import Release, epsilon
from fedge.shared.privacy.ledger import FILE, Ledger


def section(**values):
    given = {"mechanism": "example", "noise-multiplier": 1.0, "statistics": "unprotected"}
    return json.dumps({**given, **values})


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


def test_each_site_finds_the_noise_that_keeps_its_run_within_epsilon(tell, worker, ask, weights):
    asked = {"train": '{"local-steps": 4, "batch-size": 8}', "rounds": 3}
    wanted = json.dumps(
        {"mechanism": "example", "epsilon": 2.0, "delta": 1e-3, "statistics": "unprotected"}
    )
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
    wanted = json.dumps({"mechanism": "example", "statistics": "unprotected", **values})
    found = tell(worker, ask(protocol.TRAIN, weights, privacy=wanted, rounds=rounds))
    assert isinstance(found, SiteError) and found.code == 414
    assert not (worker.home / FILE).exists()
