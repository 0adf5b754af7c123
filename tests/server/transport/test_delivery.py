"""What an exchange does where requests, replies, sites and the SuperLink itself are lost for a while."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedge.server.transport.delivery import DeliveryEvents, payload_bytes
from fedge.server.transport.exchange import Exchange, exchange, no_reply_reason
from fedge.server.transport.grid_calls import Clock, GridClient, Timeouts
from fedge.server.transport.node_status import NodeStatus
from fedge.shared import protocol
from fedge.shared.errors import RunError

PROBE = RecordDict({"config": ConfigRecord({"run-id": "r"})})


class Trace:
    """Records the events of an exchange, with the time."""

    def __init__(self, time: Any) -> None:
        self.time, self.began = time, time.now()
        self.events: list[tuple[str, int, float]] = []
        self.waiting: list[tuple[float, tuple[int, ...]]] = []
        self.sent: list[tuple[int, int]] = []

    def delivery_events(self) -> DeliveryEvents:
        def on(kind: str) -> Any:
            return lambda node, seconds: self.events.append((kind, node, self.at()))

        return DeliveryEvents(
            waiting=lambda nodes, seconds: self.waiting.append((self.at(), tuple(nodes))),
            sent=lambda done, total, nbytes: self.sent.append((done, total)),
            disconnected=on("disconnected"),
            reconnected=on("reconnected"),
        )

    def at(self) -> float:
        return self.time.now() - self.began


def answer(message: Message) -> Message:
    return Message(RecordDict({"config": ConfigRecord({"of": "site"})}), reply_to=message)


def requests(nodes: Sequence[int]) -> list[Message]:
    content = RecordDict({"config": ConfigRecord({"hello": 1})})
    return [Message(content, dst_node_id=n, message_type="train", ttl=700.0) for n in nodes]


def play(
    grid: Any,
    trace: Trace,
    deadline: float = 600.0,
    probe: RecordDict | None = PROBE,
    **timeouts: Any,
) -> Exchange:
    grid_client = GridClient(grid, Clock(grid.time.now, grid.time.sleep), Timeouts(**timeouts))
    return exchange(
        NodeStatus(grid_client),
        requests(list(grid.queues)),
        deadline,
        trace.delivery_events(),
        probe,
    )


def mains(grid: Any, node: int) -> list[Message]:
    return [
        m
        for m in grid.pushed
        if m.metadata.dst_node_id == node and m.metadata.message_type == "train"
    ]


def probes(grid: Any) -> list[Message]:
    return [m for m in grid.pushed if m.metadata.message_type == protocol.PROBE]


@pytest.fixture(params=[True, False], ids=["flower 1.42", "flower 1.43"])
def grid(superlink: Any, fake_time: Any, request: pytest.FixtureRequest) -> Any:
    scripted = superlink(fake_time, answer, [1, 2, 3])
    scripted.reports_loss = request.param
    return scripted


@pytest.fixture
def trace(fake_time: Any) -> Trace:
    return Trace(fake_time)


def once(grid: Any, node: int, kind: str = "train") -> Any:
    """True for the first message of a kind to a node."""
    seen: list[str] = []

    def first(message: Message) -> bool:
        meta = message.metadata
        if (meta.dst_node_id, meta.message_type) != (node, kind) or seen:
            return False
        seen.append(meta.message_id)
        return True

    return first


def test_nothing_lost_nothing_probed(grid: Any, trace: Trace):
    got = play(grid, trace)
    assert set(got.replies) == {1, 2, 3}
    assert len(grid.pushed) == 3
    assert trace.events == []
    assert trace.sent == [(3, 3)]


@pytest.mark.parametrize("loss", ["lose", "lose_reply"])
def test_a_lost_request_or_reply_is_retried_within_seconds(loss: str, grid: Any, trace: Trace):
    setattr(grid, loss, once(grid, 2))
    got = play(grid, trace)
    assert set(got.replies) == {1, 2, 3}
    assert got.duplicates == got.stray == ()
    assert got.retries == 1
    assert trace.at() < 20
    first, second = mains(grid, 2)
    assert first.metadata.message_id != second.metadata.message_id
    assert second.metadata.created_at > first.metadata.created_at, (
        "else Flower takes it for the first"
    )
    assert second.content is first.content
    assert len(probes(grid)) == 1


def test_a_request_whose_reply_is_lost_is_sent_again_within_seconds(grid: Any, trace: Trace):
    """Flower 1.42 says so; with 1.43 the reply does not come, as if the site were still at work."""
    grid.incomplete = once(grid, 2)
    got = play(grid, trace)
    assert set(got.replies) == {1, 2, 3}
    assert got.duplicates == got.stray == ()
    assert got.retries == 1
    assert trace.at() < 20
    assert len(probes(grid)) == (0 if grid.reports_loss else 1)


def test_where_flower_says_nothing_it_is_the_probe_that_finds_out(grid: Any, trace: Trace):
    grid.incomplete = once(grid, 2)
    got = play(grid, trace, probe=None)
    assert got.timed_out == (() if grid.reports_loss else (2,))
    assert (trace.at() >= 600) is not grid.reports_loss


def test_a_request_that_is_not_stored_is_sent_again(grid: Any, trace: Trace):
    first, probe = once(grid, 2), once(grid, 3, protocol.PROBE)
    grid.refuse = lambda message: first(message) or probe(message)
    grid.lose = once(grid, 3)
    got = play(grid, trace)
    assert set(got.replies) == {1, 2, 3}
    assert got.timed_out == got.unsent == got.duplicates == got.stray == ()
    assert len(mains(grid, 2)) == 1
    assert got.sent == payload_bytes(requests([2])[0]) * 4 + payload_bytes(probes(grid)[0])
    assert trace.at() < 40


def test_a_repetition_that_is_not_stored_leaves_the_first_request_under_way(
    grid: Any, trace: Trace
):
    seen: list[Message] = []

    def repeated(message: Message) -> bool:
        main = message.metadata.message_type == "train" and message.metadata.dst_node_id == 2
        seen.extend([message] if main else [])
        return main and len(seen) > 1

    grid.refuse = repeated
    grid.slower = lambda m: 0.0 if m.metadata.message_type == protocol.PROBE else 5.0
    grid.lose_reply = once(grid, 2)
    got = play(grid, trace, deadline=100.0)
    assert len(seen) > 3
    assert (got.timed_out, got.unsent) == ((2,), ())
    assert no_reply_reason(got, 2, 100.0) == "connected, but no reply within 100 s"


@pytest.mark.parametrize("number", ["", None, "none at all"])
def test_sites_whose_requests_are_never_stored_are_not_waited_for(
    number: str | None, grid: Any, trace: Trace
):
    tries: list[int] = []
    push = grid.push_messages

    def refuse(message: Message) -> bool:
        tries.append(message.metadata.dst_node_id)
        return tries[-1] != 1

    def pushing(messages: Any) -> Any:
        ids = [stored or number for stored in push(messages)]
        return [] if set(ids) == {"none at all"} else ids

    grid.refuse, grid.push_messages = refuse, pushing
    got = play(grid, trace, large=1)
    assert set(got.replies) == {1}
    assert got.timed_out == got.unsent == (2, 3)
    assert [tries.count(node) for node in (1, 2, 3)] == [1, 3, 3]
    assert trace.at() < 10
    assert no_reply_reason(got, 2, 600.0) == "the SuperLink takes no requests for it"


def test_a_site_that_is_not_connected_either_is_not_waited_for(
    grid: Any, trace: Trace, fake_time: Any
):
    grid.refuse = lambda m: m.metadata.dst_node_id == 2
    grid.down[2] = [(fake_time.now() - 100.0, 1e9)]
    got = play(grid, trace, listing=0.5)
    assert got.timed_out == got.unsent == (2,)
    assert trace.at() < 10
    assert no_reply_reason(got, 2, 600.0).startswith("not connected for")


def test_a_deadline_between_two_refusals_says_what_was_wrong(grid: Any, trace: Trace):
    grid.refuse = lambda m: m.metadata.dst_node_id == 2
    got = play(grid, trace, deadline=3.0)
    assert got.timed_out == got.unsent == (2,)


@pytest.mark.slow
def test_a_slow_site_has_one_probe_under_way_and_is_not_asked_again(grid: Any, trace: Trace):
    grid.work = 500.0
    got = play(grid, trace)
    assert set(got.replies) == {1, 2, 3}
    assert got.retries == 0
    assert all(len(mains(grid, n)) == 1 for n in (1, 2, 3))
    assert len(probes(grid)) <= 3 * 6, "their lives double"


def test_a_lost_probe_is_replaced(grid: Any, trace: Trace):
    first, probe = once(grid, 2), once(grid, 2, protocol.PROBE)
    grid.lose = lambda message: first(message) or probe(message)
    got = play(grid, trace)
    assert set(got.replies) == {1, 2, 3}
    assert trace.at() < 60


@pytest.mark.slow
def test_a_probe_that_is_never_answered_repeats_nothing(grid: Any, trace: Trace):
    grid.lose = lambda message: message.metadata.dst_node_id == 2
    got = play(grid, trace)
    assert got.timed_out == (2,)
    assert got.disconnected == {}, "it is connected"
    assert got.retries == 0
    assert 600 <= trace.at() < 603


@pytest.mark.slow
def test_a_site_that_answers_probes_only_is_not_asked_without_end(grid: Any, trace: Trace):
    grid.lose = lambda m: m.metadata.dst_node_id == 2 and m.metadata.message_type == "train"
    got = play(grid, trace, deadline=3000.0)
    assert got.timed_out == (2,)
    assert got.retries == 30


def test_a_flood_of_probe_replies_repeats_once_a_probe(grid: Any, trace: Trace):
    grid.lose = lambda m: m.metadata.dst_node_id == 2 and m.metadata.message_type == "train"
    honest = grid.pull_messages

    def flooding(ids: Any) -> Any:
        replies = list(honest(ids))
        answered = [m for m in probes(grid)[:3] for _ in range(50)]
        return replies + [Message(PROBE, reply_to=m) for m in answered]

    grid.pull_messages = flooding
    got = play(grid, trace, deadline=100.0)
    assert got.retries <= len(probes(grid)) <= 10
    assert got.timed_out == (2,)


def test_flowers_own_answer_to_a_probe_is_none_of_the_site(grid: Any, trace: Trace):
    grid.lose = lambda m: m.metadata.dst_node_id == 2
    honest = grid.pull_messages

    def unavailable(ids: Any) -> Any:
        asked = [m for m in probes(grid) if m.metadata.message_id in ids]
        return [*honest(ids), *(grid._flower_says(m.metadata.message_id, 3) for m in asked)]

    grid.pull_messages = unavailable
    assert play(grid, trace, deadline=100.0).retries == 0


def test_a_site_of_an_older_release_answers_a_probe_with_an_error(grid: Any, trace: Trace):
    def older(message: Message) -> Message:
        if message.metadata.message_type == protocol.PROBE:
            return Message(Error(code=2, reason="no query.probe"), reply_to=message)
        return answer(message)

    grid.answer, grid.lose = older, once(grid, 2)
    got = play(grid, trace)
    assert set(got.replies) == {1, 2, 3}


def test_a_site_that_restarts_in_the_round_is_asked_again(grid: Any, trace: Trace, fake_time: Any):
    grid.down[2] = [(fake_time.now() + 1.0, fake_time.now() + 15.0)]
    got = play(grid, trace)
    assert set(got.replies) == {1, 2, 3}
    assert trace.events == [], "Flower has not noticed"
    assert trace.at() < 60


def test_a_host_that_dropped_out_is_reported_in_75_s_and_the_round_ends_at_its_deadline(
    grid: Any, trace: Trace, fake_time: Any
):
    grid.down[2] = [(fake_time.now() + 1.0, 1e9)]
    got = play(grid, trace)
    ((kind, node, at),) = trace.events
    assert (kind, node) == ("disconnected", 2)
    assert at - 1.0 < 75
    assert got.timed_out == (2,)
    assert set(got.replies) == {1, 3}
    assert 520 < got.disconnected[2] < 560
    assert 600 <= trace.at() < 603
    pauses = [b - a for (a, _), (b, _) in zip(trace.waiting, trace.waiting[1:], strict=False)]
    assert max(pauses) <= 15
    assert trace.waiting[-1][1] == (2,)
    at = trace.waiting[0][0]
    assert at <= 15


def test_a_host_that_comes_back_is_asked_again_and_counts(grid: Any, trace: Trace, fake_time: Any):
    grid.down[2] = [(fake_time.now() + 1.0, fake_time.now() + 200.0)]
    got = play(grid, trace)
    assert [(kind, node) for kind, node, _ in trace.events] == [
        ("disconnected", 2),
        ("reconnected", 2),
    ]
    assert set(got.replies) == {1, 2, 3}
    assert got.timed_out == ()
    assert trace.at() < 230


def test_a_client_process_that_dies_is_retried_a_few_times(grid: Any, trace: Trace):
    first = once(grid, 2)

    def crashing(message: Message) -> Message:
        if first(message):
            return Message(Error(code=8, reason="stopped responding"), reply_to=message)
        return answer(message)

    grid.answer = crashing
    got = play(grid, trace)
    assert not got.replies[2].has_error()
    grid.answer = lambda m: Message(Error(code=8, reason="stopped"), reply_to=m)
    got = play(grid, trace)
    assert got.replies[2].has_error(), "it is not asked without end"


@pytest.mark.parametrize("status", [None, 503])
def test_a_superlink_that_restarts_is_waited_for(
    status: int | None, grid: Any, trace: Trace, fake_time: Any
):
    import httpx

    error: BaseException = ConnectionRefusedError("refused")
    if status is not None:
        reply = httpx.Response(status, request=httpx.Request("POST", "https://localhost/"))
        error = httpx.HTTPStatusError("unavailable", request=reply.request, response=reply)
    grid.failing = [(fake_time.now() - 1.0, fake_time.now() + 40.0, error)]
    got = play(grid, trace)
    assert set(got.replies) == {1, 2, 3}
    pauses = [b - a for (a, _), (b, _) in zip(trace.waiting, trace.waiting[1:], strict=False)]
    assert trace.waiting
    assert max(pauses, default=0) <= 15


def test_501_a_superlink_that_stays_down_is_named_after_the_deadline(
    grid: Any, trace: Trace, fake_time: Any
):
    grid.failing = [(fake_time.now() + 2.0, 1e9, ConnectionRefusedError("refused"))]
    with pytest.raises(RunError, match="refused") as stopped:
        play(grid, trace, deadline=100.0)
    assert stopped.value.code == 501
    assert "list the sites" in stopped.value.message
    assert 100 <= trace.at() < 170


class NotRunning(BaseException):
    """As Flower says that a run is not running."""


@pytest.mark.parametrize("error", [NotRunning(), ValueError("wrong"), KeyboardInterrupt()])
def test_what_no_waiting_fixes_is_raised_at_once(
    error: BaseException, grid: Any, trace: Trace, fake_time: Any
):
    grid.failing = [(0.0, 1e9, error)]
    with pytest.raises(type(error)):
        play(grid, trace)
    assert trace.at() < 1


def test_large_requests_are_sent_one_by_one_and_seen(grid: Any, trace: Trace):
    play(grid, trace, large=1)
    assert trace.sent == [(1, 3), (2, 3), (3, 3)]
