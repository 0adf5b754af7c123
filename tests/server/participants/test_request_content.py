"""The requests to a site."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import builders
import numpy as np
import pytest
from flwr.serverapp import strategy as flower

from fedge.server.aggregation import strategies
from fedge.server.participants import request_content as requests
from fedge.server.participants.members import Member
from fedge.server.transport import grid_wrappers
from fedge.server.transport.delivery import GRACE
from fedge.shared import protocol
from fedge.shared.config.federation import Config
from fedge.shared.config.sections import TrainSection
from fedge.shared.preprocessing.steps import Reshape, Standardise

Arrays = dict[str, np.ndarray[Any, Any]]
MEMBERS = {f"site-{i}": Member(f"site-{i}", 100 + i, 10 * i, i) for i in range(1, 10)}


def config(strategy: dict[str, Any] | None = None, seed: int = 42, **round_options: Any) -> Config:
    own = {"run": {"seed": seed}, "sites": {"count": 9}, "train": {"learning-rate": 0.2}}
    return builders.config("breast-cancer", strategy=strategy, round=round_options, **own)


def test_the_view_shows_only_the_cohort(nodes, model: Arrays):
    grid = nodes(1000)
    view = grid_wrappers.CohortView(grid, [3, 5])
    assert list(view.get_node_ids()) == [3, 5]
    from flwr.app import ConfigRecord

    from fedge.server.aggregation.updates import record

    sent = flower.FedAvg(min_train_nodes=1, min_available_nodes=1).configure_train(
        1, record(model), ConfigRecord(), view
    )
    assert sorted(m.metadata.dst_node_id for m in sent) == [3, 5]


def test_the_view_passes_everything_else_on(nodes):
    class Recorder(type(nodes(1))):  # type: ignore[misc]
        def set_run(self, run: Any) -> None:
            seen.append(("set_run", run))

        @property
        def run(self) -> Any:
            return "the run"

        def create_message(self, *args: Any) -> Any:
            return args

        def push_messages(self, messages: Any) -> Any:
            return ["pushed", *messages]

        def pull_messages(self, message_ids: Any) -> Any:
            return ["pulled", *message_ids]

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            return ["sent", *messages, timeout]

    seen: list[Any] = []
    view = grid_wrappers.CohortView(Recorder(9), [1])
    view.set_run("r")
    assert seen == [("set_run", "r")]
    assert view.run == "the run"
    assert view.create_message("c", "train", 1, "g", 2.0) == ("c", "train", 1, "g", 2.0)
    assert view.push_messages(["m"]) == ["pushed", "m"]
    assert view.pull_messages(["i"]) == ["pulled", "i"]
    assert view.send_and_receive(["m"], timeout=3.0) == ["sent", "m", 3.0]


def test_settings_hold_the_fitted_statistics_only_where_there_are_any():
    fitted = (Standardise((1.0, 2.0), (3.0, 4.0)), Reshape((2,)))
    values = requests.settings(config(), "r-1", 5, fitted, 3)
    assert values == {
        "run-id": "r-1",
        "server-round": 5,
        "task": "breast-cancer",
        "fedge-version": version("fedge"),
        "cohort": 3,
        "seed": 42,
        "threads": 1,
        "standardise": "federated",
        "feature-mean": [1.0, 2.0],
        "feature-std": [3.0, 4.0],
    }
    for steps in ((Standardise(),), (Reshape((2,)),), ()):
        assert "feature-mean" not in requests.settings(config(), "r-1", 5, steps, 3)


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "FedAvg"},
        {"name": "FedProx", "proximal-mu": 0.3},
        {"name": "FedAdam"},
        {"name": "Scaffold"},
    ],
)
def test_training_requests(strategy: dict[str, Any], nodes, model: Arrays):
    run_config = config(strategy, deadline=30.0)
    asked = [MEMBERS[s] for s in ("site-2", "site-5")]
    built = strategies.build(run_config.strategy, client_learning_rate=0.1, num_sites=9)
    common = requests.settings(run_config, "r-1", 4, (), 3)
    sent = requests.train(
        nodes(1000), built, model, common, asked, {"site-5": 3}, run_config, needs_loss=False
    )
    assert [m.metadata.dst_node_id for m in sent] == [102, 105]
    for message, accepted in zip(sent, (0, 3), strict=True):
        assert message.metadata.message_type == "train"
        assert message.metadata.group_id == "4"
        assert message.metadata.ttl == 30.0 + GRACE
        own = message.content.config_records["config"]
        assert own["accepted-round"] == accepted
        assert own["server-round"] == 4
        assert own["loss-at"] == "running"
        parsed = TrainSection.model_validate(json.loads(str(own["train"])), strict=True)
        assert parsed == run_config.train
        assert own.get("proximal-mu") == strategy.get("proximal-mu")
        assert own.get("control") == (True if strategy["name"] == "Scaffold" else None)
        arrays = message.content.array_records["arrays"]
        for name, a in model.items():
            np.testing.assert_array_equal(arrays[name].numpy(), a)
        assert ("control/fc.bias" in arrays) == (strategy["name"] == "Scaffold")
    if strategy["name"] == "FedAdam":
        # The adaptive strategies store the model in configure_train.
        held = built.current_arrays  # type: ignore[attr-defined]
        assert {k: a.tobytes() for k, a in held.items()} == {
            k: a.tobytes() for k, a in model.items()
        }


def test_a_strategy_that_weighs_by_loss_asks_for_the_loss_as_received(nodes, model: Arrays):
    run_config = config({"name": "QFedAvg"})
    built = strategies.build(run_config.strategy, client_learning_rate=0.1, num_sites=9)
    (message,) = requests.train(
        nodes(9),
        built,
        model,
        requests.settings(run_config, "r-1", 1, (), 3),
        [MEMBERS["site-1"]],
        {},
        run_config,
        needs_loss=True,
    )
    assert message.content.config_records["config"][protocol.LOSS_AT] == "received"


def test_evaluation_requests(model: Arrays):
    run_config = config(deadline=30.0)
    asked = [MEMBERS["site-1"], MEMBERS["site-2"]]
    sent = requests.evaluate(
        model, requests.settings(run_config, "r-1", 2, (), 3), asked, run_config
    )
    assert [m.metadata.dst_node_id for m in sent] == [101, 102]
    for message in sent:
        assert message.metadata.message_type == "evaluate"
        assert message.metadata.ttl == 30.0 + GRACE
        assert set(message.content) == {"arrays", "config"}
        assert set(message.content.array_records["arrays"]) == set(model)
