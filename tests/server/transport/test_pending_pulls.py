"""A reply whose upload broke off does not delay the others', and is asked for once more."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedge.server.transport.delivery import DeliveryEvents
from fedge.server.transport.exchange import Exchange, exchange, no_reply_reason
from fedge.server.transport.grid_calls import Clock, GridClient
from fedge.server.transport.node_status import NodeStatus
from fedge.server.transport.pending_pulls import PendingPulls
from fedge.shared import protocol

PROBE = RecordDict({"config": ConfigRecord({"run-id": "r"})})
#: Seconds for which Flower waits within the call for an upload that broke off.
HELD = 180.0


def answer(message: Message) -> Message:
    return Message(RecordDict({"config": ConfigRecord({"of": "site"})}), reply_to=message)


@pytest.fixture(params=[True, False], ids=["flower 1.42", "flower 1.43"])
def grid(superlink: Any, fake_time: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Node 2's first reply is announced and never complete: a caller that asks for it waits in the call.

    In the end Flower 1.42 says that it is gone; 1.43 says nothing.
    """
    over = threading.Event()

    class Broken(superlink):  # type: ignore[misc]
        broken, slow = "m1", ""

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            ids = list(message_ids)
            if self.slow in ids:
                replies = list(super().pull_messages(ids))
                time.sleep(0.15 if replies else 0.0)
                return replies
            begun = self.time.now()
            while self.broken in ids and self.time.now() < begun + HELD and not over.is_set():
                time.sleep(0.005)
            replies = list(super().pull_messages([i for i in ids if i != self.broken]))
            incomplete = self.reports_loss and self.broken in ids
            return [*replies, self._flower_says(self.broken, 3)] if incomplete else replies

    broken = Broken(fake_time, answer, [1, 2, 3])
    broken.reports_loss = request.param
    yield broken
    over.set()


def play(grid: Any, events: DeliveryEvents, deadline: float) -> Exchange:
    grid_client = GridClient(grid, Clock(grid.time.now, grid.time.sleep))
    content = RecordDict({"config": ConfigRecord({"hello": 1})})
    asked = [Message(content, dst_node_id=n, message_type="train", ttl=700.0) for n in (1, 2, 3)]
    return exchange(NodeStatus(grid_client), asked, deadline, events, PROBE)


def test_the_others_are_heard_at_once_and_the_broken_one_is_asked_again(grid: Any):
    began, replied_at = grid.time.now(), {}
    got = play(
        grid,
        DeliveryEvents(reply=lambda n, _: replied_at.update({n: grid.time.now() - began})),
        600.0,
    )
    assert set(got.replies) == {1, 2, 3}
    assert max(replied_at[1], replied_at[3]) < 10
    assert replied_at[2] < 60, "its probe was answered, so nothing of the first reply is under way"
    assert got.retries == 1


def test_a_reply_that_is_never_complete_is_named_at_the_deadline_and_ends_nothing(grid: Any):
    def silent(message: Message) -> Message | None:
        # A node that still uploads answers no probe.
        probe = message.metadata.message_type == protocol.PROBE
        return None if probe and message.metadata.dst_node_id == 2 else answer(message)

    grid.answer = silent
    waited: list[tuple[int, ...]] = []
    got = play(grid, DeliveryEvents(waiting=lambda nodes, _: waited.append(tuple(nodes))), 100.0)
    assert set(got.replies) == {1, 3}
    assert got.arriving == (2,)
    assert (
        no_reply_reason(got, 2, 100.0) == "connected, but its reply was not complete within 100 s"
    )
    assert set(waited) == {(2,)}
    assert len(waited) >= 8


@pytest.mark.slow
def test_a_reply_that_takes_its_time_is_fetched_once(grid: Any):
    grid.broken, grid.slow = "", "m2"
    for _ in range(5):
        got = play(grid, DeliveryEvents(), 600.0)
        assert set(got.replies) == {1, 2, 3}
        assert (got.duplicates, got.stray) == ((), ())
        grid.slow = f"m{len(grid.pushed) + 2}"


def test_what_the_superlink_refuses_goes_out_where_it_is_collected(superlink: Any, fake_time: Any):
    grid = superlink(fake_time, answer, [1])
    response = httpx.Response(403, request=httpx.Request("POST", "http://127.0.0.1"))
    refused = httpx.HTTPStatusError("forbidden", request=response.request, response=response)
    grid.failing = [(0.0, 1e9, refused)]
    with pytest.raises(httpx.HTTPStatusError, match="forbidden"):
        PendingPulls(GridClient(grid)).take([["m0"]])
    grid.failing = [(0.0, 1e9, ConnectionRefusedError("refused"))]
    grid_client = GridClient(grid)
    assert PendingPulls(grid_client).take([["m0"]]) == ([], [], True)
    assert grid_client.failing_since is not None


@pytest.mark.parametrize("error", [KeyError("Nothing"), ValueError("bad"), AttributeError("x")])
def test_a_reply_that_flower_cannot_read_counts_as_an_empty_one_of_its_site(
    superlink: Any, fake_time: Any, error: Exception
):
    """Flower 1.42 takes a reply apart after it has confirmed it, so it comes no second time."""

    class Hostile(superlink):  # type: ignore[misc]
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            if any(reply.metadata.src_node_id == 2 for reply in replies):
                raise error
            return replies

    got = play(Hostile(fake_time, answer, [1, 2, 3]), DeliveryEvents(), 600.0)
    assert {node: list(got.replies[node].content) for node in (1, 2, 3)} == {
        1: ["config"],
        2: [],
        3: ["config"],
    }
    assert got.retries == 0
