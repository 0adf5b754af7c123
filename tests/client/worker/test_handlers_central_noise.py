"""A site under the server's noise: plain training, charged before it is told, once a run where sampling hides it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import privacy_asked

from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger.ledger import FILE, Ledger


@pytest.fixture
def request_of(ask, weights):
    def request(server_round=1, rounds=100, **values):
        return ask(
            protocol.TRAIN,
            weights,
            server_round=server_round,
            privacy=privacy_asked("central", **values),
            rounds=rounds,
        )

    return request


def charged(worker):
    return [entry.charge.release for entry in Ledger(worker.home / FILE).entries()]


def test_a_sampled_run_is_charged_once_before_the_first_update(tell, worker, request_of):
    sampled = {"sampling-rate": 0.1}
    metrics = tell(worker, request_of(**sampled))[protocol.METRICS]
    assert metrics["epsilon-consumers"] == pytest.approx(7.0466, abs=1e-3)
    assert metrics["epsilon-server"] == math.inf
    assert protocol.TRAIN_LOSS not in metrics
    again = tell(worker, request_of(server_round=7, **sampled))[protocol.METRICS]
    assert again["epsilon-consumers"] == metrics["epsilon-consumers"]
    assert charged(worker) == [Release(1.0, 0.1, 100)]


def test_without_sampling_each_round_is_charged(tell, worker, request_of):
    tell(worker, request_of())
    tell(worker, request_of(server_round=2))
    assert charged(worker) == [Release(1.0), Release(1.0)]


@pytest.mark.parametrize(
    "changes", [{"rounds": 200}, {"sampling-rate": 0.2}, {"noise-multiplier": 0.5}]
)
def test_other_terms_in_the_same_run_are_refused(tell, worker, request_of, changes):
    tell(worker, request_of(**{"sampling-rate": 0.1}))
    found = tell(worker, request_of(server_round=2, **{"sampling-rate": 0.1, **changes}))
    assert isinstance(found, SiteError) and found.code == 414
    assert "as this run was charged for" in str(found)
    assert len(charged(worker)) == 1


@pytest.mark.parametrize("rounds", [0, 2, None, True])
def test_a_round_beyond_the_run_is_refused(tell, worker, request_of, rounds):
    found = tell(worker, request_of(server_round=3, rounds=rounds, **{"sampling-rate": 0.1}))
    assert isinstance(found, SiteError) and found.code == 414


def test_a_policy_that_bounds_the_server_refuses_the_server_s_own_noise(
    tell, task, data, request_of, tmp_path
):
    worker = SiteWorker("site-1", task, data, tmp_path, privacy=PrivacyPolicy)
    found = tell(worker, request_of())
    assert isinstance(found, SiteError) and found.code == 427
    assert "without noise" in str(found)


def test_the_update_is_the_plain_one(tell, worker, ask, weights, request_of, task, data, tmp_path):
    private = tell(worker, request_of())[protocol.ARRAYS]
    plain = tell(SiteWorker("site-1", task, data, tmp_path), ask(protocol.TRAIN, weights))
    for name, array in plain[protocol.ARRAYS].items():
        assert np.array_equal(array.numpy(), private[name].numpy())
