"""The step from admitted results to the next model, and what stops it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from pydantic import TypeAdapter

from fedge.server.aggregation import strategies
from fedge.server.aggregation.aggregate import aggregate
from fedge.server.aggregation.updates import Singles, record
from fedge.shared.config import strategies as cfg
from fedge.shared.errors import RunError

Arrays = dict[str, np.ndarray[Any, Any]]
STATEFUL: dict[str, dict[str, Any]] = {
    "FedAvgM": {"server-learning-rate": 0.7, "server-momentum": 0.9},
    "FedAdam": {},
    "FedYogi": {},
    "FedAdagrad": {},
    "Scaffold": {},
}


def built(name: str, **options: Any) -> Any:
    section = TypeAdapter(cfg.StrategySection).validate_python({"name": name, **options})
    return strategies.build(section, client_learning_rate=0.1, num_sites=10)


def play(strategy: Any, server_round: int, arrays: Arrays, sites, nodes) -> Arrays:
    (request, *_) = strategy.configure_train(server_round, record(arrays), ConfigRecord(), nodes(7))
    sent = request.content.array_records["arrays"]
    control = [k.removeprefix("control/") for k in sent if k.startswith("control/")]
    updates = Singles(sites(server_round, arrays, control=control))
    return aggregate(strategy, server_round, updates, arrays, with_loss=False)


def frozen(arrays: Arrays) -> dict[str, bytes]:
    return {k: a.tobytes() for k, a in arrays.items()}


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian", "Krum", "Scaffold"])
def test_the_model_keeps_its_names_order_shapes_and_types(name: str, counted: Arrays, sites, nodes):
    before = frozen(counted)
    made = play(built(name), 1, counted, sites, nodes)
    assert list(made) == list(counted)
    for key, a in counted.items():
        assert made[key].shape == a.shape
        assert made[key].dtype == a.dtype
    assert frozen(counted) == before, "the current model must stay what it is"


def test_half_precision_stays_half_precision(sites, nodes):
    arrays = {"a": np.ones((2, 2), dtype=np.float16)}
    assert play(built("FedAdam"), 1, arrays, sites, nodes)["a"].dtype == np.float16


@pytest.mark.parametrize("name", list(STATEFUL))
def test_an_infinite_step_is_refused_and_forgotten(name: str, model: Arrays, sites, nodes):
    strategy, twin = built(name, **STATEFUL[name]), built(name, **STATEFUL[name])
    second = play(strategy, 1, model, sites, nodes)
    play(twin, 1, model, sites, nodes)
    before = frozen(strategies.state(strategy))
    assert before

    rate = "server_learning_rate" if hasattr(strategy, "server_learning_rate") else "eta"
    usual = getattr(strategy, rate)
    setattr(strategy, rate, 1e300)
    with pytest.raises(RunError, match="finite") as refused:
        play(strategy, 2, second, sites, nodes)
    assert refused.value.code == 507
    assert frozen(strategies.state(strategy)) == before

    # The round can be played again, as if the bad one had never been.
    setattr(strategy, rate, usual)
    again = play(strategy, 2, second, sites, nodes)
    assert frozen(again) == frozen(play(twin, 2, second, sites, nodes))
    assert frozen(strategies.state(strategy)) == frozen(strategies.state(twin))


def test_an_infinite_step_of_the_first_round_leaves_no_memory(model: Arrays, sites, nodes):
    strategy = built("FedAdam", eta=1000.0, tau=1e-300)
    strategy.eta = 1e300
    with pytest.raises(RunError) as refused:
        play(strategy, 1, model, sites, nodes)
    assert refused.value.code == 507
    assert strategies.state(strategy) == {}


def test_infinite_memory_is_refused_though_the_model_is_finite(model: Arrays, sites, nodes):
    strategy = built("FedAdam", **{"beta-1": 0.0})
    far = {k: np.full_like(a, 1e30) for k, a in model.items()}
    list(strategy.configure_train(1, record(model), ConfigRecord(), nodes(7)))
    # The squared update overflows float32, and eta / infinity is a step of zero.
    with pytest.raises(RunError, match="v_t/") as refused:
        aggregate(strategy, 1, Singles(sites(1, far)), model, with_loss=False)
    assert refused.value.code == 507


def test_no_replies_make_no_model(model: Arrays, nodes):
    strategy = built("FedAvg")
    list(strategy.configure_train(1, record(model), ConfigRecord(), nodes(7)))
    with pytest.raises(RunError, match="FedAvg") as refused:
        aggregate(strategy, 1, Singles(()), model, with_loss=False)
    assert refused.value.code == 506


def test_what_the_strategy_cannot_do_is_an_error_of_the_run(model: Arrays, sites, nodes):
    strategy = built("QFedAvg")
    list(strategy.configure_train(1, record(model), ConfigRecord(), nodes(7)))
    with pytest.raises(RunError, match="loss") as refused:
        aggregate(strategy, 1, Singles(sites(1, model)), model, with_loss=False)
    assert refused.value.code == 506
