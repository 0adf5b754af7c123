"""The strategies against Flower's own classes, against the papers' formulas, and across a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from pydantic import TypeAdapter

from fedge.server.aggregation import strategies
from fedge.server.aggregation.aggregate import aggregate
from fedge.server.aggregation.updates import Singles, Update, record
from fedge.server.runs import checkpoints
from fedge.shared.config import strategies as cfg
from fedge.shared.errors import RunError

Arrays = dict[str, np.ndarray[Any, Any]]
ROUNDS = 4
ALL = {"fraction_train": 1.0, "fraction_evaluate": 1.0}

# Our section, and Flower's class as somebody who knows nothing of fedge would construct it.
TWELVE: dict[str, tuple[dict[str, Any], Callable[[], flower.FedAvg]]] = {
    "FedAvg": ({}, lambda: flower.FedAvg(**ALL)),
    "FedProx": ({"proximal-mu": 0.1}, lambda: flower.FedProx(proximal_mu=0.1, **ALL)),
    "FedAvgM": (
        {"server-learning-rate": 0.7, "server-momentum": 0.9},
        lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.9, **ALL),
    ),
    "FedAdam": (
        {"eta": 0.05, "beta-1": 0.8, "beta-2": 0.95, "tau": 0.01},
        lambda: flower.FedAdam(eta=0.05, beta_1=0.8, beta_2=0.95, tau=0.01, **ALL),
    ),
    "FedYogi": (
        {"eta": 0.05, "beta-1": 0.8, "beta-2": 0.95, "tau": 0.01},
        lambda: flower.FedYogi(eta=0.05, beta_1=0.8, beta_2=0.95, tau=0.01, **ALL),
    ),
    "FedAdagrad": (
        {"eta": 0.05, "tau": 0.01},
        lambda: flower.FedAdagrad(eta=0.05, tau=0.01, **ALL),
    ),
    "QFedAvg": (
        {"q": 0.4, "client-learning-rate": 0.2},
        lambda: flower.QFedAvg(client_learning_rate=0.2, q=0.4, train_loss_key="train-loss", **ALL),
    ),
    "FedMedian": ({}, lambda: flower.FedMedian(**ALL)),
    "FedTrimmedAvg": ({"beta": 0.3}, lambda: flower.FedTrimmedAvg(beta=0.3, **ALL)),
    "Krum": ({"num-malicious-nodes": 2}, lambda: flower.Krum(num_malicious_nodes=2, **ALL)),
    "MultiKrum": (
        {"num-malicious-nodes": 2, "num-nodes-to-select": 3},
        lambda: flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=3, **ALL),
    ),
    "Bulyan": ({"num-malicious-nodes": 1}, lambda: flower.Bulyan(num_malicious_nodes=1, **ALL)),
}
OPTIONS = {name: options for name, (options, _) in TWELVE.items()} | {
    "Scaffold": {"server-learning-rate": 0.8}
}
# The variants that published tables need, and those whose memory is special.
VARIANTS = [
    *OPTIONS.items(),
    ("FedAvgM", {}),
    ("FedAvgM", {"server-learning-rate": 0.5}),
    ("FedAdam", {"bias-correction": False}),
    ("FedAdagrad", {"beta-1": 0.9}),
]


def section(name: str, options: dict[str, Any]) -> Any:
    return TypeAdapter(cfg.StrategySection).validate_python({"name": name, **options})


def built(name: str, options: dict[str, Any]) -> flower.FedAvg:
    return strategies.build(section(name, options), client_learning_rate=0.1, num_sites=10)


def step(strategy: flower.FedAvg, name: str, server_round: int, arrays: Arrays, sites, nodes):
    """One round of ours: what is sent, what the sites make of it, the next model."""
    sent = list(strategy.configure_train(server_round, record(arrays), ConfigRecord(), nodes(7)))
    assert len(sent) == 7
    control = [k.removeprefix("control/") for k in sent[0].content["arrays"] if "control/" in k]
    updates = sites(server_round, arrays, control=control)
    return aggregate(strategy, server_round, Singles(updates), arrays, with_loss=name == "QFedAvg")


def test_thirteen_names_are_offered():
    members = get_args(get_args(cfg.StrategySection)[0])
    names = {get_args(member.model_fields["name"].annotation)[0] for member in members}
    assert names == set(OPTIONS)


@pytest.mark.parametrize("name", list(TWELVE))
def test_each_gives_exactly_what_flowers_class_gives(name: str, model: Arrays, sites, nodes):
    options, construct = TWELVE[name]
    ours, theirs = built(name, options), construct()
    assert isinstance(ours, getattr(flower, name))
    mine, reference = dict(model), dict(model)
    for server_round in range(1, ROUNDS + 1):
        mine = step(ours, name, server_round, mine, sites, nodes)

        flowers = ArrayRecord({k: Array(a) for k, a in reference.items()})
        requests = list(theirs.configure_train(server_round, flowers, ConfigRecord(), nodes(7)))
        replies = []
        for request, update in zip(requests, sites(server_round, reference), strict=True):
            metrics: dict[str, Any] = {"num-examples": update.num_examples}
            if name == "QFedAvg":
                metrics["train-loss"] = update.train_loss
            content = RecordDict(
                {
                    "arrays": ArrayRecord({k: Array(a) for k, a in update.arrays.items()}),
                    "metrics": MetricRecord(metrics),
                }
            )
            replies.append(Message(content, reply_to=request))
        made, _ = theirs.aggregate_train(server_round, replies)
        assert made is not None
        reference = {k: made[k].numpy().astype(model[k].dtype) for k in model}

        for key, a in reference.items():
            assert mine[key].dtype == a.dtype
            np.testing.assert_array_equal(mine[key], a, err_msg=f"round {server_round}, {key}")
    assert not np.array_equal(mine["fc.weight"], model["fc.weight"])


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{n}-{len(o)}" for n, o in VARIANTS])
def test_a_fresh_strategy_continues_bit_for_bit_at_every_boundary(
    name: str, options: dict[str, Any], counted: Arrays, sites, nodes, tmp_path: Path
):
    def play(strategy: flower.FedAvg, arrays: Arrays, first: int) -> list[Arrays]:
        models = []
        for server_round in range(first, ROUNDS + 1):
            arrays = step(strategy, name, server_round, arrays, sites, nodes)
            commit = checkpoints.write(tmp_path, server_round, arrays, strategies.state(strategy))
            commits[server_round] = commit
            models.append(arrays)
        return models

    commits: dict[int, Any] = {}
    whole = play(built(name, options), counted, 1)
    for boundary in range(1, ROUNDS):
        fresh = built(name, options)
        arrays, memory = checkpoints.load(tmp_path, commits[boundary], list(counted))
        strategies.restore(fresh, memory)
        digests = [commits[r].checkpoint_sha256 for r in range(boundary + 1, ROUNDS + 1)]
        again = play(fresh, arrays, boundary + 1)
        for old, new in zip(whole[boundary:], again, strict=True):
            assert {k: a.tobytes() for k, a in old.items()} == {
                k: a.tobytes() for k, a in new.items()
            }
        # The checkpoints hold the memory too, so they must be the same files.
        assert digests == [commits[r].checkpoint_sha256 for r in range(boundary + 1, ROUNDS + 1)]


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "Scaffold"])
def test_without_its_memory_a_strategy_goes_astray(name: str, model: Arrays, sites, nodes):
    strategy = built(name, OPTIONS[name])
    second = step(strategy, name, 1, model, sites, nodes)
    memory = strategies.state(strategy)
    assert memory
    kept = step(strategy, name, 2, second, sites, nodes)
    fresh = built(name, OPTIONS[name])
    lost = step(fresh, name, 2, second, sites, nodes)
    same = {k: np.array_equal(a, lost[k]) for k, a in kept.items()}
    if name == "Scaffold":
        # Its memory reaches the weights through the sites.
        assert strategies.state(strategy).keys() == strategies.state(fresh).keys()
        assert any(
            not np.array_equal(a, strategies.state(fresh)[k])
            for k, a in strategies.state(strategy).items()
        )
    else:
        assert not any(same.values())


def test_restore_empties_what_the_memory_does_not_hold(model: Arrays, sites, nodes):
    strategy = built("FedAdam", {})
    step(strategy, "FedAdam", 1, model, sites, nodes)
    assert strategies.state(strategy)
    strategies.restore(strategy, {})
    assert strategies.state(strategy) == {}


def test_state_is_not_changed_by_later_rounds(model: Arrays, sites, nodes):
    for name, options in OPTIONS.items():
        strategy = built(name, options)
        second = step(strategy, name, 1, model, sites, nodes)
        held = strategies.state(strategy)
        before = {k: a.tobytes() for k, a in held.items()}
        step(strategy, name, 2, second, sites, nodes)
        assert {k: a.tobytes() for k, a in held.items()} == before, name


def _mean_changes(updates: tuple[Update, ...], arrays: Arrays, prefix: str = "") -> Arrays:
    weight = sum(u.num_examples for u in updates)
    zero = {k: 0.0 if prefix else a for k, a in arrays.items()}
    return {
        k: sum(u.num_examples / weight * (u.arrays[prefix + k] - zero[k]) for u in updates)
        for k in arrays
    }


def _wide(model: Arrays) -> Arrays:
    return {k: a.astype(np.float64) for k, a in model.items()}


def test_fedadam_without_bias_correction_is_the_papers(model: Arrays, sites, nodes):
    # Adaptive Federated Optimization, Algorithm 2, FedAdam.
    eta, beta_1, beta_2, tau = 0.05, 0.9, 0.99, 1e-3
    options = {"eta": eta, "tau": tau, "beta-1": beta_1, "beta-2": beta_2}
    paper = built("FedAdam", {**options, "bias-correction": False})
    default = built("FedAdam", options)
    x, mine, theirs = _wide(model), _wide(model), _wide(model)
    m = {k: np.zeros_like(a) for k, a in x.items()}
    v = {k: np.zeros_like(a) for k, a in x.items()}
    for server_round in range(1, ROUNDS + 1):
        delta = _mean_changes(sites(server_round, x), x)
        m = {k: beta_1 * m[k] + (1 - beta_1) * delta[k] for k in x}
        v = {k: beta_2 * v[k] + (1 - beta_2) * delta[k] ** 2 for k in x}
        x = {k: x[k] + eta * m[k] / (np.sqrt(v[k]) + tau) for k in x}
        mine = step(paper, "FedAdam", server_round, mine, sites, nodes)
        theirs = step(default, "FedAdam", server_round, theirs, sites, nodes)
        for k in x:
            np.testing.assert_allclose(mine[k], x[k], rtol=1e-12, atol=1e-12)
            assert not np.allclose(mine[k], theirs[k], rtol=1e-3)
    assert paper.eta == eta, "the correction must not stay in the strategy"


@pytest.mark.parametrize("beta_1", [0.0, 0.9])
def test_fedadagrad_is_the_papers_with_either_beta_1(beta_1: float, model: Arrays, sites, nodes):
    eta, tau = 0.05, 1e-3
    strategy = built("FedAdagrad", {"eta": eta, "tau": tau, "beta-1": beta_1})
    x, mine = _wide(model), _wide(model)
    m = {k: np.zeros_like(a) for k, a in x.items()}
    v = {k: np.zeros_like(a) for k, a in x.items()}
    for server_round in range(1, ROUNDS + 1):
        delta = _mean_changes(sites(server_round, x), x)
        m = {k: beta_1 * m[k] + (1 - beta_1) * delta[k] for k in x}
        v = {k: v[k] + delta[k] ** 2 for k in x}
        x = {k: x[k] + eta * m[k] / (np.sqrt(v[k]) + tau) for k in x}
        mine = step(strategy, "FedAdagrad", server_round, mine, sites, nodes)
        for k in x:
            np.testing.assert_allclose(mine[k], x[k], rtol=1e-12, atol=1e-12)


def test_scaffold_steps_weights_and_control_as_the_paper_says(model: Arrays, sites, nodes):
    # SCAFFOLD, Algorithm 1, lines 16 and 17, with means weighted by examples; |S| = 7, N = 10.
    eta = 0.8
    strategy = built("Scaffold", {"server-learning-rate": eta})
    x, mine = _wide(model), _wide(model)
    c = {k: np.zeros_like(a) for k, a in x.items()}
    for server_round in range(1, ROUNDS + 1):
        updates = sites(server_round, x, control=x)
        changes = _mean_changes(updates, x)
        control = _mean_changes(updates, x, "control/")
        x = {k: x[k] + eta * changes[k] for k in x}
        c = {k: c[k] + 7 / 10 * control[k] for k in x}
        mine = step(strategy, "Scaffold", server_round, mine, sites, nodes)
        held = strategies.state(strategy)
        for k in x:
            np.testing.assert_allclose(mine[k], x[k], rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(held[f"control/{k}"], c[k], rtol=1e-12, atol=1e-12)


def test_scaffold_sends_its_control_beside_the_weights(counted: Arrays, sites, nodes):
    strategy = built("Scaffold", {})
    config = ConfigRecord()
    (first, *_) = strategy.configure_train(1, record(counted), config, nodes(2))
    sent = {k: a.numpy() for k, a in first.content.array_records["arrays"].items()}
    floats = {k for k, a in counted.items() if a.dtype.kind == "f"}
    assert set(sent) == set(counted) | {f"control/{k}" for k in floats}
    assert "control/batches" not in sent
    for k in floats:
        assert sent[f"control/{k}"].dtype == counted[k].dtype
        assert not sent[f"control/{k}"].any()
    assert first.content.config_records["config"]["control"] is True
    step(strategy, "Scaffold", 1, counted, sites, nodes)
    (later, *_) = strategy.configure_train(2, record(counted), config, nodes(2))
    held = strategies.state(strategy)
    assert held.keys() == {f"control/{k}" for k in floats}
    for k in held:
        np.testing.assert_array_equal(later.content.array_records["arrays"][k].numpy(), held[k])


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("FedAvg", {}, 1),
        ("FedMedian", {}, 1),
        ("Krum", {"num-malicious-nodes": 2}, 7),
        ("MultiKrum", {"num-malicious-nodes": 1, "num-nodes-to-select": 2}, 5),
        ("Bulyan", {"num-malicious-nodes": 0}, 3),
        ("Bulyan", {"num-malicious-nodes": 2}, 11),
    ],
)
def test_minimum_replies(name: str, options: dict[str, Any], least: int):
    assert strategies.minimum_replies(section(name, options)) == least


@pytest.mark.parametrize("count", [1, 6, 7])
def test_bulyan_refuses_fewer_than_4f_plus_3(count: int, model: Arrays, sites, nodes):
    strategy = built("Bulyan", {"num-malicious-nodes": 1})
    list(strategy.configure_train(1, record(model), ConfigRecord(), nodes(count)))
    updates, before = Singles(sites(1, model, count=count)), dict(vars(strategy))
    if count == 7:
        made = aggregate(strategy, 1, updates, model, with_loss=False)
        assert not np.array_equal(made["fc.weight"], model["fc.weight"])
        return
    with pytest.raises(RunError, match="Bulyan") as refused:
        aggregate(strategy, 1, updates, model, with_loss=False)
    assert refused.value.code == 506
    assert vars(strategy) == before


def test_qfedavg_takes_the_sites_learning_rate_where_none_is_given():
    assert built("QFedAvg", {}).client_learning_rate == 0.1  # type: ignore[attr-defined]
    assert built("QFedAvg", {"client-learning-rate": 0.3}).client_learning_rate == 0.3  # type: ignore[attr-defined]


def test_only_qfedavg_weighs_by_loss():
    assert [n for n, o in OPTIONS.items() if strategies.weighs_by_loss(section(n, o))] == [
        "QFedAvg"
    ]
