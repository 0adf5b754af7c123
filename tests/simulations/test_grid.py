"""The in-process Grid under Flower's own ClientApp and ServerApp objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedge.simulations.grid import InProcessGrid

SITES = {1: "north", 2: "south", 3: "west"}


class Sites:
    """A ClientApp that counts, and fails on demand."""

    def __init__(self) -> None:
        self.worked: list[str] = []
        self.app = ClientApp()
        self.app.train()(self.train)
        self.app.query("name")(self.name)

    def name(self, message: Message, context: Context) -> Message:
        return Message(
            RecordDict({"config": ConfigRecord({"site": str(context.node_config["site"])})}),
            reply_to=message,
        )

    def train(self, message: Message, context: Context) -> Message:
        site = str(context.node_config["site"])
        self.worked.append(site)
        config = message.content.config_records["config"]
        if config.get("fail") == site:
            raise RuntimeError("patient 4711 at /data/secret.csv")
        arrays = message.content.array_records["arrays"]
        moved = {k: Array(a.numpy() + context.node_id) for k, a in arrays.items()}
        metrics = MetricRecord({"num-examples": 10 * context.node_id})
        return Message(
            RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message
        )


@pytest.fixture
def sites() -> Sites:
    return Sites()


@pytest.fixture
def grid(sites: Sites) -> InProcessGrid:
    return InProcessGrid(SITES, sites.app, 9)


def requests(**config: Any) -> list[Message]:
    return [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord({"w": Array(np.zeros(2, np.float32))}),
                    "config": ConfigRecord(config),
                }
            ),
            dst_node_id=node,
            message_type="train",
        )
        for node in SITES
    ]


def test_it_is_flowers_public_grid(grid: InProcessGrid):
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [1, 2, 3]


def test_flowers_own_server_runs_over_it(grid: InProcessGrid):
    """Flower's ServerApp and FedAvg, unchanged: 1, 2 and 3 added with weights 10, 20 and 30."""
    server, seen = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
        result = FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0).start(
            grid, start, num_rounds=2
        )
        seen.append(result.arrays["w"].numpy())

    server(grid, Context(9, 0, {}, RecordDict(), {}))
    np.testing.assert_allclose(seen[0], np.full(2, 2 * 14 / 6), rtol=1e-6)


def test_one_reply_a_pull_and_a_site_works_when_it_is_pulled(grid: InProcessGrid, sites: Sites):
    ids = list(grid.push_messages(requests()))
    assert len(set(ids)) == 3
    assert sites.worked == []
    for count, node in enumerate(SITES, start=1):
        (reply,) = grid.pull_messages(ids)
        assert len(sites.worked) == count
        assert reply.metadata.src_node_id == node
        assert reply.metadata.reply_to_message_id == ids[count - 1]
    assert list(grid.pull_messages(ids)) == []
    assert sites.worked == ["north", "south", "west"], "nobody works twice"


def test_only_what_is_asked_for_is_worked_on(grid: InProcessGrid, sites: Sites):
    ids = list(grid.push_messages(requests()))
    (reply,) = grid.pull_messages([ids[2], "unknown"])
    assert reply.metadata.src_node_id == 3
    assert sites.worked == ["west"]
    assert list(grid.pull_messages(["unknown"])) == []


def test_flower_1_43_renames_the_ids(grid: InProcessGrid):
    ids = list(grid.push_messages(requests()))
    (one,) = grid.pull_messages(message_ids=ids[1:])
    (other,) = grid.pull_messages(reply_to_message_ids=ids[2:])
    assert [r.metadata.src_node_id for r in (one, other)] == [2, 3]
    assert list(grid.pull_messages(reply_to_message_ids=["unknown"])) == []
    assert list(grid.pull_messages()) == [], "node 1's is still there, and nobody asked for it"


def test_message_ids_never_come_again(grid: InProcessGrid):
    first, second = (list(grid.push_messages(requests())) for _ in range(2))
    assert not set(first) & set(second)


def test_an_exception_becomes_an_error_without_its_text(grid: InProcessGrid, sites: Sites):
    replies = list(grid.send_and_receive(requests(fail="south")))
    assert sites.worked == ["north", "south", "west"]
    assert [r.has_error() for r in replies] == [False, True, False]
    error = replies[1].error
    assert error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "4711" not in str(error.reason)
    assert "secret" not in str(error.reason)
    assert replies[1].metadata.src_node_id == 2


def test_an_unknown_node_or_question_is_an_error_too(grid: InProcessGrid):
    (unknown, unasked) = requests()[:2]
    unknown = grid.create_message(unknown.content, "train", 99, "1")
    unasked = grid.create_message(unasked.content, "evaluate", 1, "1")
    replies = list(grid.send_and_receive([unknown, unasked]))
    assert [r.has_error() for r in replies] == [True, True]


def test_an_interrupt_is_no_error_of_a_site(grid: InProcessGrid, sites: Sites):
    def stop(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    app = ClientApp()
    app.train()(stop)
    grid = InProcessGrid(SITES, app, 9)
    ids = list(grid.push_messages(requests()))
    with pytest.raises(KeyboardInterrupt):
        grid.pull_messages(ids)


def test_what_a_site_does_to_its_request_no_other_site_sees():
    seen: list[list[str]] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        arrays = message.content.array_records["arrays"]
        listed = config["list"]
        assert isinstance(listed, list)
        seen.append([*arrays, *config, *(str(v) for v in listed)])
        listed.append(66)
        config["poison"] = 66
        arrays["w"].data = b"poison"
        arrays.clear()
        message.content.clear()
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(SITES, app, 9)
    shared = requests(list=[1, 2])[0].content
    sent = [Message(shared, dst_node_id=node, message_type="train") for node in SITES]
    assert len(list(grid.send_and_receive(sent))) == 3
    assert seen == [["w", "list", "1", "2"]] * 3
    np.testing.assert_array_equal(
        shared.array_records["arrays"]["w"].numpy(), np.zeros(2, np.float32)
    )


def test_a_site_keeps_its_context_and_sees_no_other(grid: InProcessGrid):
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        count = context.state.metric_records.setdefault("count", MetricRecord({"n": 0}))
        count["n"] = int(count["n"]) + context.node_id  # type: ignore[arg-type]
        return Message(RecordDict({"metrics": MetricRecord(dict(count))}), reply_to=message)

    grid = InProcessGrid(SITES, app, 9)
    for played in (1, 2):
        replies = grid.send_and_receive(requests())
        assert [r.content.metric_records["metrics"]["n"] for r in replies] == [
            played * node for node in SITES
        ]


@pytest.mark.slow
def test_each_site_is_charged_its_own_time(grid: InProcessGrid):
    import time

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_id == 2:
            time.sleep(3)
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(SITES, app, 9)
    taken = {r.metadata.src_node_id: grid.elapsed(r) for r in grid.send_and_receive(requests())}
    assert taken[2] >= 3
    assert taken[1] < 3
    assert taken[3] < 3
    within = grid.send_and_receive(requests(), timeout=2.5)
    assert [r.metadata.src_node_id for r in within] == [1, 3]


def test_queries_go_to_their_function(grid: InProcessGrid):
    message = grid.create_message(RecordDict(), "query.name", 2, "0", 60.0)
    assert message.metadata.ttl == 60.0
    (reply,) = grid.send_and_receive([message])
    assert reply.content.config_records["config"]["site"] == "south"


def test_the_run_is_a_number_only(grid: InProcessGrid):
    assert requests()[0].metadata.run_id == 9
    grid.set_run(SimpleNamespace(run_id=12))
    assert requests()[0].metadata.run_id == 12
    with pytest.raises(LookupError, match="SuperLink"):
        _ = grid.run
