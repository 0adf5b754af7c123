import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.steps import Scale, Standardise
from fedge.shared.wire.tensors import read

TRAIN, EVALUATE, REGISTER = protocol.TRAIN, protocol.EVALUATE, protocol.REGISTER


def arrays(reply):
    return {k: a.numpy() for k, a in reply[protocol.ARRAYS].items()}


def metrics(reply):
    return dict(reply[protocol.METRICS])


def same(one, other):
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and one[k].tobytes() == other[k].tobytes() for k in one
    )


def refused(reply, code=414):
    assert isinstance(reply, SiteError)
    assert reply.code == code


def with_control(weights, value=0.0):
    control = {f"control/{k}": np.full_like(a, value) for k, a in weights.items()}
    return weights | control


def change_of(reply):
    found = arrays(reply)
    return {k.removeprefix("control/"): a for k, a in found.items() if k.startswith("control/")}


# Registering


def test_register_tells_sizes_and_sums(tell, worker, ask, data):
    found = metrics(tell(worker, ask(REGISTER)))
    sums = preprocessing.statistics((Standardise(),), data.train_features)
    assert found == {
        "num-train-examples": 37,
        "num-test-examples": 13,
        "feature-total": list(sums.total),
        "feature-total-of-squares": list(sums.total_of_squares),
    }


def test_register_tells_no_sums_where_each_site_keeps_its_own(tell, worker, ask):
    found = metrics(tell(worker, ask(REGISTER, standardise="site")))
    assert set(found) == {"num-train-examples", "num-test-examples"}


def test_register_tells_no_sums_where_nothing_is_learnt(tell, task, data, ask, tmp_path):
    plain = SiteWorker("a", replace(task, preprocessing=(Scale(0.5),)), data, tmp_path)
    assert set(metrics(tell(plain, ask(REGISTER)))) == {"num-train-examples", "num-test-examples"}


# Training


def test_train_replies_exactly_what_the_protocol_says(tell, worker, ask, weights):
    reply = tell(worker, ask(TRAIN, weights, server_round=3))
    assert set(reply) == {"arrays", "metrics", "config"}
    assert dict(reply["config"]) == {
        "site": "site-1",
        "run-id": "r-1",
        "server-round": 3,
        "task": "blobs",
    }
    trained = arrays(reply)
    assert list(trained) == list(weights)
    for name, a in trained.items():
        assert (a.shape, a.dtype) == (weights[name].shape, weights[name].dtype)
        assert not np.array_equal(a, weights[name])
    assert set(metrics(reply)) == {"num-examples", "train-loss"}
    assert metrics(reply)["num-examples"] == 37


def test_training_learns(tell, worker, ask, weights):
    for server_round in range(1, 16):
        weights = arrays(tell(worker, ask(TRAIN, weights, server_round=server_round)))
    found = metrics(tell(worker, ask(EVALUATE, weights)))
    assert found["correct"] / found["examples"] > 0.9


def test_the_request_is_left_as_it_was(tell, worker, ask, weights):
    before = {k: a.copy() for k, a in weights.items()}
    request = ask(TRAIN, weights)
    tell(worker, request)
    assert same(arrays(request.content), before)


def test_same_request_same_bits_whatever_came_before(
    tell, worker, task, data, ask, weights, tmp_path
):
    request = ask(TRAIN, weights, server_round=4)
    first = arrays(tell(worker, request))
    tell(worker, ask(TRAIN, weights, server_round=1, train='{"local-steps": 3}'))
    tell(worker, ask(EVALUATE, weights, feature_mean=[0.0, 9.0]))
    tell(worker, ask(TRAIN, {"wrong": np.zeros(1)}))
    torch.rand(7)
    assert same(arrays(tell(worker, request)), first)
    fresh = SiteWorker("site-1", task, data, tmp_path / "elsewhere")
    assert same(arrays(tell(fresh, request)), first)


def test_seed_round_and_site_change_the_draw(tell, worker, task, data, ask, weights, tmp_path):
    first = arrays(tell(worker, ask(TRAIN, weights)))
    assert not same(arrays(tell(worker, ask(TRAIN, weights, seed=43))), first)
    assert not same(arrays(tell(worker, ask(TRAIN, weights, server_round=2))), first)
    other = SiteWorker("site-2", task, data, tmp_path / "site-2")
    assert not same(arrays(tell(other, ask(TRAIN, weights))), first)


def test_dropout_is_drawn_by_seed_site_and_round(tell, task, data, ask, tmp_path):
    dropping = replace(
        task, network=lambda: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    )
    start = {k: t.numpy() for k, t in dropping.network().state_dict().items()}
    state = torch.random.get_rng_state()
    first, second = (
        arrays(tell(SiteWorker("a", dropping, data, tmp_path), ask(TRAIN, start))) for _ in range(2)
    )
    assert same(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_local_epochs_are_their_steps(tell, worker, ask, weights):
    # 37 rows in batches of 8: five steps an epoch.
    epochs = ask(TRAIN, weights, server_round=3, train='{"batch-size": 8, "local-epochs": 2}')
    steps = ask(TRAIN, weights, server_round=3, train='{"batch-size": 8, "local-steps": 10}')
    assert same(arrays(tell(worker, epochs)), arrays(tell(worker, steps)))


def test_proximal_mu_changes_the_result(tell, worker, ask, weights):
    settings = '{"learning-rate": 0.1, "local-steps": 20}'
    moved = [
        sum(
            float(np.linalg.norm(a - weights[k]))
            for k, a in arrays(
                tell(worker, ask(TRAIN, weights, train=settings, proximal_mu=mu))
            ).items()
        )
        for mu in (0.0, 5.0)
    ]
    assert moved[1] < moved[0] / 2


def test_loss_at_received_is_of_the_weights_as_sent(tell, worker, task, data, ask, weights):
    reply = tell(worker, ask(TRAIN, weights, loss_at="received"))
    net = task.network()
    net.load_state_dict({k: torch.from_numpy(a.copy()) for k, a in weights.items()})
    x = Standardise((1.5, 1.5), (1.5, 2.0)).apply(data.train_features)
    with torch.no_grad():
        expected = task.loss(net(torch.from_numpy(x)), torch.from_numpy(data.train_labels))
    assert metrics(reply)["train-loss"] == pytest.approx(expected.item(), rel=1e-6)
    running = tell(worker, ask(TRAIN, weights))
    assert metrics(running)["train-loss"] != metrics(reply)["train-loss"]
    assert same(arrays(running), arrays(reply))


def test_diverging_training_is_the_sites_own_error(tell, worker, ask, weights):
    wild = '{"learning-rate": 1000, "momentum": 0.99, "weight-decay": 1000, "local-steps": 200}'
    refused(tell(worker, ask(TRAIN, weights, train=wild)), 401)


def test_batch_norm_buffers_pass_through(tell, task, data, ask, tmp_path):
    normed = replace(
        task, network=lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    )
    start = {k: t.numpy() for k, t in normed.network().state_dict().items()}
    site = SiteWorker("a", normed, data, tmp_path)
    control = {f"control/{k}": np.zeros_like(a) for k, a in start.items() if a.dtype.kind == "f"}
    reply = tell(site, ask(TRAIN, start | control, control=True, accepted_round=0))
    found = arrays(reply)
    assert list(found) == [*start, *control]
    assert found["1.num_batches_tracked"].dtype == np.int64
    assert found["1.num_batches_tracked"] == 5
    assert not found["control/1.running_mean"].any()
    assert found["control/0.weight"].any()


# SCAFFOLD


def test_scaffold_replies_the_change_of_its_variate(tell, worker, ask, weights):
    settings = '{"learning-rate": 0.05, "batch-size": 8, "local-steps": 6}'
    plain = arrays(tell(worker, ask(TRAIN, weights, train=settings)))
    reply = tell(
        worker, ask(TRAIN, with_control(weights), train=settings, control=True, accepted_round=0)
    )
    for name, change in change_of(reply).items():
        # All variates are zero, so the steps are plain and c_i+ = (x - y) / (K lr).
        np.testing.assert_array_equal(arrays(reply)[name], plain[name])
        np.testing.assert_allclose(
            change, (weights[name] - plain[name]) / (6 * 0.05), rtol=1e-4, atol=1e-6
        )


def test_scaffold_uses_the_state_of_the_accepted_round(tell, worker, ask, weights):
    def round_of(server_round, accepted):
        return tell(
            worker,
            ask(
                TRAIN,
                with_control(weights, 0.01),
                control=True,
                server_round=server_round,
                accepted_round=accepted,
            ),
        )

    first = change_of(round_of(1, 0))
    second = round_of(2, 1)
    again = round_of(2, 1)
    assert same(arrays(second), arrays(again))
    # Round 2 was refused: round 3 starts from round 1 again, not from round 2.
    third = round_of(3, 1)
    held = {k: first[k] + change_of(third)[k] for k in first}
    stored = worker.home / "control" / "r-1" / "000003.safetensors"
    for name, a in read(stored).items():
        np.testing.assert_allclose(a, held[name], atol=1e-6)


def test_scaffold_goes_on_after_a_restart(tell, worker, task, data, ask, weights):
    one = ask(TRAIN, with_control(weights), control=True, accepted_round=0)
    two = ask(TRAIN, with_control(weights), control=True, server_round=2, accepted_round=1)
    tell(worker, one)
    restarted = SiteWorker("site-1", task, data, worker.home)
    assert same(arrays(tell(restarted, two)), arrays(tell(worker, two)))


def test_scaffold_without_its_state_fails(tell, worker, ask, weights):
    lost = ask(TRAIN, with_control(weights), control=True, server_round=5, accepted_round=4)
    refused(tell(worker, lost), 413)


def test_control_variates_must_be_there_when_asked_for_and_only_then(tell, worker, ask, weights):
    refused(tell(worker, ask(TRAIN, weights, control=True, accepted_round=0)))
    refused(tell(worker, ask(TRAIN, with_control(weights))))


# Evaluating


def test_evaluate_counts_over_the_test_split(tell, worker, task, data, ask, weights):
    reply = tell(worker, ask(EVALUATE, weights))
    assert protocol.ARRAYS not in reply
    found = metrics(reply)
    assert set(found) == {"num-examples", *task.counter_names}
    assert found["num-examples"] == found["examples"] == 13
    assert 0 <= found["correct"] <= 13
    assert math.isfinite(found["loss-sum"])


# Standardising


def test_federated_statistics_are_the_servers(tell, worker, ask, weights):
    one = metrics(tell(worker, ask(EVALUATE, weights)))
    other = metrics(tell(worker, ask(EVALUATE, weights, feature_mean=[5.0, 5.0])))
    assert one["loss-sum"] != other["loss-sum"]
    assert not (worker.home / "statistics.json").exists()


def test_the_sites_own_statistics_are_used_and_left_for_its_devices(
    tell, worker, data, ask, weights
):
    own = {"standardise": "site", "feature_mean": None, "feature_std": None}
    found = metrics(tell(worker, ask(EVALUATE, weights, **own)))
    written = json.loads((worker.home / "statistics.json").read_text())
    np.testing.assert_allclose(written["mean"], data.train_features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(written["std"], data.train_features.std(0, ddof=1), rtol=1e-5)
    told = ask(EVALUATE, weights, feature_mean=written["mean"], feature_std=written["std"])
    assert metrics(tell(worker, told)) == found


# Refusing


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
@pytest.mark.parametrize(
    "bad",
    [
        {"layers.0.weight": np.zeros((1,), np.float32)},
        {"layers.0.weight": np.full((4, 2), np.nan, np.float32)},
        {"layers.0.weight": np.zeros((4, 2), np.float64)},
        {"more": np.zeros(2, np.float32)},
    ],
)
def test_other_weights_are_refused(tell, worker, ask, weights, kind, bad):
    refused(tell(worker, ask(kind, weights | bad)))


@pytest.mark.parametrize("kind", ["query", "query.secrets", "train.other", "evaluate.x", "system"])
def test_other_requests_are_refused(tell, worker, ask, weights, kind):
    refused(tell(worker, ask(kind, weights)))


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE, REGISTER])
def test_incomplete_requests_are_refused(tell, worker, ask, weights, kind):
    refused(tell(worker, ask(kind, weights, drop="config")))
    refused(tell(worker, ask(kind, weights, task="digits")))
    if kind != REGISTER:
        refused(tell(worker, ask(kind)))


def test_a_failure_travels_as_its_number_and_its_text_stays(
    tell, task, data, ask, weights, tmp_path, caplog
):
    def broken(logits, labels):
        raise RuntimeError("patient 4711 in /srv/data")

    site = SiteWorker("a", replace(task, loss=broken), data, tmp_path)
    with caplog.at_level(logging.ERROR, "fedge.client.worker.handlers"):
        reply = tell(site, ask(TRAIN, weights))
    refused(reply, 413)
    assert "4711" in caplog.text
    assert "4711" not in str(reply)
    assert protocol.METRICS in tell(site, ask(EVALUATE, weights))


def test_threads_are_set(tell, worker, ask, weights):
    before = torch.get_num_threads()
    try:
        tell(worker, ask(EVALUATE, weights, threads=2))
        assert torch.get_num_threads() == 2
        tell(worker, ask(EVALUATE, weights, threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# Probing


def test_a_probe_is_answered_at_once_and_tells_whether_the_site_works(
    tell, worker, task, data, ask, weights, tmp_path
):
    assert dict(tell(worker, ask(protocol.PROBE))[protocol.METRICS]) == {"busy": 0}
    found = []

    def loss(logits, labels):
        if not found:
            found.append(tell(site, ask(protocol.PROBE, server_round=2)))
        return task.loss(logits, labels)

    site = SiteWorker("a", replace(task, loss=loss), data, tmp_path)
    assert protocol.ARRAYS in tell(site, ask(TRAIN, weights, server_round=2))
    assert dict(found[0][protocol.METRICS]) == {"busy": 1}
    assert dict(found[0][protocol.CONFIG]) == {
        "site": "a",
        "run-id": "r-1",
        "server-round": 2,
        "task": "blobs",
    }


def test_a_probe_of_another_task_is_refused(tell, worker, ask):
    refused(tell(worker, ask(protocol.PROBE, task="digits")))
    refused(tell(worker, ask(protocol.PROBE, drop="config")))


def test_float16_without_a_gpu_is_refused(tell, worker, ask, weights):
    refused(tell(worker, ask(TRAIN, weights, train='{"mixed-precision": "float16"}')))
    refused(tell(worker, ask(TRAIN, weights, train='{"mixed-precision": "int4"}')))
    half = tell(worker, ask(TRAIN, weights, train='{"mixed-precision": "bfloat16"}'))
    assert {a.dtype for a in arrays(half).values()} == {np.dtype(np.float32)}
