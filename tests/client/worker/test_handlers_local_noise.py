"""A worker that adds all of its own noise: what it says when it registers, when it trains, and after a crash."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import builders
import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedge.client.data.dataset import SiteData
from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.preprocessing.steps import Scale
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.secagg import messages

TRAIN = '{"local-steps": 4, "batch-size": 8, "learning-rate": 0.5}'


section = partial(builders.privacy_asked, mechanism="local")


def arrays(reply):
    return {k: a.numpy() for k, a in reply[protocol.ARRAYS].items()}


def moved(reply, weights):
    return np.concatenate([(a - weights[k]).ravel() for k, a in arrays(reply).items()])


def test_a_reply_weighs_one_and_tells_what_was_spent_and_no_loss(tell, worker, ask, weights):
    request = ask(protocol.TRAIN, weights, privacy=section(), train=TRAIN)
    reply = tell(worker, request)
    spent = epsilon([Release(1.0)], 1e-5)
    assert dict(reply[protocol.METRICS]) == {
        "num-examples": 1,
        "epsilon-consumers": pytest.approx(spent),
        "epsilon-server": pytest.approx(spent),
        "epsilon-delta": 1e-5,
    }
    (entry,) = Ledger(worker.home / FILE).entries()
    assert (entry.charge.unit, entry.charge.mechanism) == ("site", "local")
    assert entry.charge.release == Release(1.0)
    assert reply[protocol.CONFIG][protocol.PRIVACY_LEDGER] == entry.hash


def test_asked_again_it_sends_the_same_bytes_also_after_a_crash(
    tell, task, data, worker, ask, weights
):
    request = ask(protocol.TRAIN, weights, privacy=section(), train=TRAIN)
    first = arrays(tell(worker, request))
    again = SiteWorker("site-1", task, data, worker.home)
    for one in (worker, again):
        assert all(np.array_equal(a, first[k]) for k, a in arrays(tell(one, request)).items())
    assert len(Ledger(worker.home / FILE).entries()) == 1
    # Another round is another release, with other noise.
    other = arrays(
        tell(again, ask(protocol.TRAIN, weights, server_round=2, privacy=section(), train=TRAIN))
    )
    assert all(not np.array_equal(a, first[k]) for k, a in other.items())
    assert len(Ledger(worker.home / FILE).entries()) == 2


@pytest.mark.slow
def test_the_noise_is_of_twice_the_bound_on_every_parameter(tell, worker, ask, weights):
    found = []
    for number in range(1, 41):
        request = ask(
            protocol.TRAIN,
            weights,
            server_round=number,
            privacy=section(**{"noise-multiplier": 5.0, "clipping-bound": 0.5}),
            train=TRAIN,
        )
        found.append(moved(tell(worker, request), weights))
    all_ = np.concatenate(found)
    # The clipped update is a hundredth of that.
    wanted = (5.0 * 2 * 0.5) ** 2
    assert abs(all_.var() - wanted) < 3 * wanted * np.sqrt(2 / all_.size) + 0.5**2 / 22
    assert all_.var() > 2 * wanted / 4


def test_with_little_noise_the_update_is_the_clipped_one(tell, worker, ask, weights):
    exact = moved(tell(worker, ask(protocol.TRAIN, weights, train=TRAIN)), weights)
    little = section(**{"noise-multiplier": 0.01, "clipping-bound": 0.25})
    found = moved(tell(worker, ask(protocol.TRAIN, weights, privacy=little, train=TRAIN)), weights)
    wanted = exact * min(1.0, 0.25 / np.linalg.norm(exact))
    assert np.linalg.norm(exact) > 0.25
    assert abs(found - wanted).max() < 6 * 0.01 * 0.5


def test_a_site_without_training_examples_sends_noise_alone(
    tell, task, data, ask, weights, tmp_path
):
    task = replace(task, preprocessing=(Scale(0.5),))
    empty = SiteData(
        data.train_features[:0], data.train_labels[:0], data.test_features, data.test_labels
    )
    worker = SiteWorker("a", task, empty, tmp_path)
    reply = tell(worker, ask(protocol.TRAIN, weights, privacy=section(), train=TRAIN))
    assert reply[protocol.METRICS]["num-examples"] == 1
    assert moved(reply, weights).std() > 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"privacy": section(statistics="off")}, "privacy.statistics: must be unprotected"),
        ({"privacy": section(), "loss_at": "received"}, "loss-at: must be running"),
        (
            {"privacy": section(**{"noise-multiplier": 1e-3})},
            "privacy: noise: must be 1000",
        ),
    ],
)
def test_what_would_tell_more_than_is_charged_is_refused(tell, worker, ask, weights, changes, says):
    found = tell(worker, ask(protocol.TRAIN, weights, train=TRAIN, **changes))
    assert isinstance(found, SiteError)
    assert (found.code, found.message[: len(says)]) == (414, says)
    assert not (worker.home / FILE).exists()


def test_under_masks_it_is_refused(tell, worker, ask, weights):
    request = ask(protocol.TRAIN, weights, privacy=section(), train=TRAIN)
    request.content[messages.SECURE] = ConfigRecord({"x": 1})
    found = tell(worker, request)
    assert isinstance(found, SiteError)
    assert (
        "privacy.mechanism: must be distributed under secure aggregation, got local"
        in found.message
    )


def test_the_budget_stops_the_round_that_would_exceed_it(tell, task, data, ask, weights, tmp_path):
    policy = PrivacyPolicy(epsilon=epsilon([Release(1.0)], 1e-5) * 1.01)
    worker = SiteWorker("site-1", task, data, tmp_path, privacy=lambda: policy)
    assert not isinstance(
        tell(worker, ask(protocol.TRAIN, weights, privacy=section(), train=TRAIN)), SiteError
    )
    found = tell(
        worker, ask(protocol.TRAIN, weights, server_round=2, privacy=section(), train=TRAIN)
    )
    assert isinstance(found, SiteError)
    assert found.code == 427


# Registration


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({}, (1, 0)),
        ({"metrics": "noised", "metrics-noise-multiplier": 1.0}, (1, 1)),
        ({"metrics": "unprotected"}, (1, 13)),
        ({"mechanism": "central"}, (1, 0)),
        ({"mechanism": "central-mf"}, (1, 0)),
        ({"mechanism": "distributed"}, (1, 0)),
        # An example's number is the update's weight, and tells its epsilon; how many are held out is nobody's to know.
        ({"mechanism": "example"}, (37, 0)),
        ({"mechanism": "example", "metrics": "noised", "metrics-noise-multiplier": 1.0}, (37, 1)),
        ({"mechanism": "example", "metrics": "unprotected"}, (37, 13)),
    ],
)
def test_it_says_as_little_of_its_size_as_it_can(tell, worker, ask, values, sizes):
    shown = tell(worker, ask(protocol.REGISTER, privacy=section(**values), standardise="site"))
    assert dict(shown[protocol.METRICS]) == {
        "num-train-examples": sizes[0],
        "num-test-examples": sizes[1],
    }


def test_means_stand_for_sums_where_statistics_are_unprotected(tell, worker, ask, data):
    shown = tell(worker, ask(protocol.REGISTER, privacy=section()))[protocol.METRICS]
    plain = tell(worker, ask(protocol.REGISTER))[protocol.METRICS]
    assert plain["num-train-examples"] == 37
    for key in ("feature-total", "feature-total-of-squares"):
        assert shown[key] == pytest.approx([v / 37 for v in plain[key]])
    assert shown["feature-total"] == pytest.approx(data.train_features.mean(axis=0), rel=1e-5)


def test_sums_do_not_leave_where_the_section_keeps_them(tell, worker, ask):
    found = tell(worker, ask(protocol.REGISTER, privacy=section(statistics="off")))
    assert isinstance(found, SiteError)
    assert found.message.startswith("privacy.statistics: must be unprotected")
    # The site's own need no word, as they do not leave.
    shown = tell(
        worker, ask(protocol.REGISTER, privacy=section(statistics="off"), standardise="site")
    )
    assert protocol.FEATURE_TOTAL not in shown[protocol.METRICS]
