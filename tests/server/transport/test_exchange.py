"""One exchange over a network that delays, loses, repeats and invents messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid

from fedge.server.transport.delivery import DeliveryEvents, payload_bytes
from fedge.server.transport.exchange import exchange
from fedge.server.transport.grid_calls import TimedGrid
from fedge.shared import protocol
from fedge.simulations import flower_patches

# What a node does with a request: (seconds from the push, reply) pairs.
Behaviour = Callable[[Message], list[tuple[float, Message]]]


class Network(Grid):
    """A grid with a clock: every node's replies lie ready when their time has come."""

    def __init__(self, nodes: dict[int, Behaviour]) -> None:
        self.nodes = nodes
        self.under_way: list[tuple[float, Message]] = []
        self.pulls = 0
        self.asked_for: list[list[str]] = []

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        raise AssertionError("it polls every three seconds; the loop must not use it")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(f"id-{message.metadata.dst_node_id}")
            flower_patches.number(message, ids[-1])
            for delay, reply in self.nodes[message.metadata.dst_node_id](message):
                self.under_way.append((time.monotonic() + delay, reply))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        self.asked_for.append(list(message_ids))
        here = [entry for entry in self.under_way if entry[0] <= time.monotonic()]
        self.under_way = [entry for entry in self.under_way if entry not in here]
        return [reply for _, reply in here]


def reply(request: Message, value: int = 1) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"value": value})}), reply_to=request)


def after(*delays: float) -> Behaviour:
    return lambda request: [(delay, reply(request, i)) for i, delay in enumerate(delays)]


def ask(node: int) -> Message:
    content = RecordDict({"config": ConfigRecord({"hello": 1})})
    return Message(content, dst_node_id=node, message_type=protocol.TRAIN)


def asked(*nodes: int) -> list[Message]:
    return [ask(node) for node in nodes]


def value(message: Message) -> Any:
    return message.content.metric_records["metrics"]["value"]


def test_all_answer_and_the_deadline_is_not_waited_for():
    network = Network({n: after(0.0) for n in (3, 1, 2)})
    reported: list[tuple[int, int]] = []
    pushed: list[int] = []
    started = time.monotonic()
    got = exchange(
        network,
        asked(3, 1, 2),
        30.0,
        DeliveryEvents(
            reply=lambda node, count: reported.append((node, count)),
            pushed=lambda: pushed.append(len(reported)),
        ),
    )
    assert time.monotonic() - started < 25
    assert set(got.replies) == {1, 2, 3}
    assert (got.late, got.timed_out, got.duplicates, got.stray) == ((), (), (), ())
    assert reported == [(3, 1), (1, 2), (2, 3)]
    assert pushed == [0], "all requests are out before the first reply is pulled"


@pytest.mark.slow
def test_the_absent_are_named_when_the_deadline_has_passed_and_polling_ends():
    network = Network({1: after(0.0), 2: after(), 3: after()})
    started = time.monotonic()
    got = exchange(network, asked(1, 2, 3), 1.5)
    took = time.monotonic() - started
    assert set(got.replies) == {1}
    assert got.timed_out == (2, 3)
    assert 1.5 <= took < 60
    assert sum("id-2" in ids for ids in network.asked_for) < 26, "pauses grow: without, 30"
    assert network.asked_for[-2:] == [["id-2"], ["id-3"]], "what is here is not asked for again"
    pulls = network.pulls
    assert exchange(network, [], 30.0).replies == {}
    assert network.pulls == pulls, "nothing asked, nothing pulled"


def test_a_reply_within_the_deadline_counts_though_it_takes_its_time():
    got = exchange(Network({1: after(0.1)}), asked(1), 60.0)
    assert set(got.replies) == {1}
    assert got.late == ()


def test_a_late_reply_is_named_and_does_not_count():
    """Two replies are ready in one pull, which the network itself delays beyond the deadline."""

    class Slow(Network):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            time.sleep(0.06)
            return super().pull_messages(message_ids)

    reported: list[int] = []
    got = exchange(
        Slow({1: after(0.0)}),
        asked(1),
        0.05,
        DeliveryEvents(reply=lambda node, count: reported.append(node)),
    )
    assert got.replies == {}
    assert got.late == (1,)
    assert got.timed_out == ()
    assert reported == [1]


def test_a_timed_grid_says_how_long_each_site_took():
    class Taking(Network):
        def elapsed(self, reply: Message) -> float:
            return {1: 0.2, 2: 9.0}[reply.metadata.src_node_id]

    network = Taking({1: after(0.0), 2: after(0.0)})
    assert isinstance(network, TimedGrid)
    assert not isinstance(Network({}), TimedGrid)
    got = exchange(network, asked(1, 2), 1.0)
    assert set(got.replies) == {1}
    assert got.late == (2,)


def test_sites_that_take_turns_are_not_cut_off_by_the_clock():
    """Three sites of 0.05 s each, one reply a pull, within a deadline of 0.1 s each."""

    class Turns(Network):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            time.sleep(0.05)
            _, message = self.under_way.pop(0)
            return [message]

        def elapsed(self, reply: Message) -> float:
            return 0.05

    got = exchange(Turns({n: after(0.0) for n in (1, 2, 3)}), asked(1, 2, 3), 0.1)
    assert set(got.replies) == {1, 2, 3}


def test_the_first_of_two_replies_counts():
    got = exchange(Network({1: after(0.0, 0.0), 2: after(0.03)}), asked(1, 2), 60.0)
    assert value(got.replies[1]) == 0
    assert got.duplicates == (1,)
    assert set(got.replies) == {1, 2}


def test_a_reply_to_nothing_that_was_asked_is_stray():
    def confused(request: Message) -> list[tuple[float, Message]]:
        unasked = ask(1)
        flower_patches.number(unasked, "of-yesterday")
        return [(0.0, reply(unasked, 66)), (0.0, reply(request))]

    got = exchange(Network({1: confused}), asked(1), 60.0)
    assert got.stray == (1,)
    assert value(got.replies[1]) == 1


def test_a_node_cannot_answer_for_another():
    other: list[Message] = []

    def victim(request: Message) -> list[tuple[float, Message]]:
        other.append(request)
        return [(0.03, reply(request, 1))]

    def forger(request: Message) -> list[tuple[float, Message]]:
        forged = reply(other[0], 66)
        forged.metadata.__dict__["_src_node_id"] = 2
        return [(0.0, forged), (0.0, reply(request, 2))]

    got = exchange(Network({1: victim, 2: forger}), asked(1, 2), 60.0)
    assert {node: value(m) for node, m in got.replies.items()} == {1: 1, 2: 2}
    assert got.stray == (2,)


def test_a_flood_of_strays_does_not_outlive_the_deadline():
    class Flood(Network):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            self.pulls += 1
            if self.pulls > 1000:
                raise AssertionError("polls without end")
            unasked = ask(1)
            flower_patches.number(unasked, "of-yesterday")
            return [reply(unasked)]

    started = time.monotonic()
    got = exchange(Flood({1: after()}), asked(1), 0.1)
    assert time.monotonic() - started < 30
    assert got.timed_out == (1,)
    assert 1 <= len(got.stray) <= 1000


def test_an_error_that_flower_itself_answers_with_does_not_count_for_the_site():
    """Flower's own error for a lost reply names the server as its source; the site may still be asked again."""

    def lost(request: Message) -> list[tuple[float, Message]]:
        error = Message(Error(code=4, reason="reply unavailable"), reply_to=request)
        error.metadata.__dict__["_src_node_id"] = 0
        return [(0.0, error)]

    got = exchange(Network({1: lost}), asked(1), 0.1)
    assert got.replies == {}
    assert got.timed_out == (1,)
    assert got.stray == ()


def test_bytes_are_counted_both_ways():
    request = ask(1)
    got = exchange(Network({1: after(0.0, 0.0)}), [request], 60.0)
    assert got.sent == payload_bytes(request) > 0
    assert got.received == 2 * payload_bytes(got.replies[1]) > 0
    assert payload_bytes(Message(Error(code=1), reply_to=request)) == 0


def test_bytes_are_flowers_count():
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.ones((2, 3), np.float32))}),
            "config": ConfigRecord({"a": True, "bc": [1, 2], "d": "text", "e": [b"xy", b"z"]}),
            "metrics": MetricRecord({"m": 0.5, "list": [1.0, 2.0, 3.0]}),
        }
    )
    message = Message(content, dst_node_id=1, message_type=protocol.TRAIN)
    assert payload_bytes(message) == sum(r.count_bytes() for r in content.values())


@pytest.mark.parametrize("empty", ["", b"", []])
def test_an_empty_value_does_not_stop_the_round(empty: Any):
    """Flower's count of bytes raises here, so one site could have ended every run."""
    content = RecordDict({"config": ConfigRecord({"site": empty})})
    with pytest.raises((ValueError, IndexError)):
        content.config_records["config"].count_bytes()
    got = exchange(
        Network({1: lambda request: [(0.0, Message(content, reply_to=request))]}), asked(1), 5.0
    )
    assert got.received == len("site")
    assert set(got.replies) == {1}
