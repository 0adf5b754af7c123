"""Single updates and one sum of them: the same aggregate, and nothing of the updates is used up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from pydantic import TypeAdapter

from fedge.server.aggregation import strategies
from fedge.server.aggregation.aggregate import aggregate
from fedge.server.aggregation.updates import Singles, Summed, as_replies, record, summed
from fedge.shared.config import strategies as cfg

Arrays = dict[str, np.ndarray[Any, Any]]
# The strategies that look at nothing but the weighted mean.
OF_THE_MEAN: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedProx": {"proximal-mu": 0.1},
    "FedAvgM": {"server-learning-rate": 0.7, "server-momentum": 0.9},
    "FedAdam": {"eta": 0.05},
    "FedYogi": {"eta": 0.05},
    "FedAdagrad": {"eta": 0.05},
    "Scaffold": {"server-learning-rate": 0.8},
}


def built(name: str, options: dict[str, Any]) -> Any:
    section = TypeAdapter(cfg.StrategySection).validate_python({"name": name, **options})
    return strategies.build(section, client_learning_rate=0.1, num_sites=10)


@pytest.mark.parametrize("name", list(OF_THE_MEAN))
def test_a_sum_gives_the_same_model_and_memory_as_its_parts(
    name: str, counted: Arrays, sites, nodes
):
    ends = []
    for of in (Singles, summed):
        strategy, arrays = built(name, OF_THE_MEAN[name]), counted
        for server_round in range(1, 4):
            (request, *_) = strategy.configure_train(
                server_round, record(arrays), ConfigRecord(), nodes(7)
            )
            sent = request.content.array_records["arrays"]
            control = [k.removeprefix("control/") for k in sent if k.startswith("control/")]
            # Both see the sites answer to the first one's model, so differences cannot add up unseen.
            updates = sites(server_round, counted, control=control)
            arrays = aggregate(strategy, server_round, of(updates), arrays, with_loss=False)
        ends.append((arrays, strategies.state(strategy)))
    (singles, memory), (one, its_memory) = ends
    assert memory.keys() == its_memory.keys()
    for name_of, a in (singles | memory).items():
        other = (one | its_memory)[name_of]
        assert other.dtype == a.dtype
        assert other.shape == a.shape
        np.testing.assert_allclose(other, a, rtol=1e-6, atol=1e-6, err_msg=name_of)


def test_the_sum_is_weighted_by_examples(model: Arrays, sites):
    updates = sites(1, model, count=2)
    made = summed(updates)
    assert made.sites == ("site-1", "site-2")
    assert made.weight == 10 + 17
    assert made.loss_total == pytest.approx(10 * 0.2 + 17 * 0.3)
    expected = 10 * updates[0].arrays["wide"] + 17 * updates[1].arrays["wide"]
    np.testing.assert_allclose(made.mean["wide"], expected / 27, rtol=1e-15)


def test_an_integer_mean_is_rounded_not_cut_off(counted: Arrays):
    mean = {k: 1.0 * a for k, a in counted.items()} | {"batches": np.asarray(4.9)}
    result = Summed(("site-1", "site-2"), mean, 3, 0.0)
    made = aggregate(built("FedAvg", {}), 1, result, counted, with_loss=False)
    assert made["batches"] == 5
    assert made["batches"].dtype == np.int64


@pytest.mark.parametrize("name", ["FedMedian", "FedTrimmedAvg", "QFedAvg", "Bulyan", "FedAvg"])
def test_a_strategy_that_empties_its_replies_leaves_the_updates_whole(
    name: str, counted: Arrays, sites, nodes
):
    strategy = built(name, {})
    list(strategy.configure_train(1, record(counted), ConfigRecord(), nodes(7)))
    updates, twin = sites(1, counted), sites(1, counted)
    aggregate(strategy, 1, Singles(updates), counted, with_loss=name == "QFedAvg")
    for update, same in zip(updates, twin, strict=True):
        assert update.arrays.keys() == same.arrays.keys()
        for key, a in same.arrays.items():
            np.testing.assert_array_equal(update.arrays[key], a)


def test_flowers_median_does_empty_its_replies(model: Arrays, sites, nodes):
    """The twin of the test above: without fresh replies the updates would be gone."""
    strategy = built("FedMedian", {})
    dtypes = {k: str(a.dtype) for k, a in model.items()}
    replies = as_replies(Singles(sites(1, model)), dtypes)
    strategy.aggregate_train(1, replies)
    assert not replies[0].content.array_records["arrays"]


def test_replies_are_fresh_at_every_call(model: Arrays, sites):
    updates = Singles(sites(1, model))
    dtypes = {k: str(a.dtype) for k, a in model.items()}
    first, second = as_replies(updates, dtypes), as_replies(updates, dtypes)
    first[0].content.array_records["arrays"].clear()
    assert set(second[0].content.array_records["arrays"]) == set(model)


def test_replies_hold_weight_and_arrays_and_the_loss_only_when_asked(model: Arrays, sites):
    updates = Singles(sites(1, model))
    dtypes = {k: str(a.dtype) for k, a in model.items()}
    for with_loss in (False, True):
        replies = as_replies(updates, dtypes, with_loss=with_loss)
        for update, reply in zip(updates.updates, replies, strict=True):
            metrics = dict(reply.content.metric_records["metrics"])
            expected: dict[str, Any] = {"num-examples": update.num_examples}
            if with_loss:
                expected["train-loss"] = update.train_loss
            assert metrics == expected
            for key, a in update.arrays.items():
                got = reply.content.array_records["arrays"][key].numpy()
                assert got.dtype == a.dtype
                np.testing.assert_array_equal(got, a)


def test_a_sums_reply_has_the_models_types_and_the_mean_loss(model: Arrays, sites):
    updates = sites(1, model)
    dtypes = {k: str(a.dtype) for k, a in model.items()}
    (reply,) = as_replies(summed(updates), dtypes, with_loss=True)
    arrays = reply.content.array_records["arrays"]
    assert {k: a.dtype for k, a in arrays.items()} == dtypes
    weight = sum(u.num_examples for u in updates)
    loss = sum(u.num_examples * (u.train_loss or 0.0) for u in updates) / weight
    metrics = reply.content.metric_records["metrics"]
    assert metrics["num-examples"] == weight
    assert metrics["train-loss"] == pytest.approx(loss)
