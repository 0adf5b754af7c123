"""The grid that packs: one record goes out, replies come back unpacked, and unreadable ones reach the gate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedge.server.admission.validation import admit_train
from fedge.server.admission.validation_result import Expected
from fedge.server.transport.grid_wrappers import PackedGrid
from fedge.shared import protocol
from fedge.shared.config.sections import AdmissionSection
from fedge.shared.wire import packed
from fedge.simulations import flower_patches

SENT = np.zeros((2, 3), dtype=np.float32)


class Scripted(Grid):
    """Keeps the pushed messages, and replies as scripted."""

    def __init__(self) -> None:
        self.pushed: list[Message] = []
        self.replies: dict[str, Message] = {}
        self.calls: list[Any] = []

    def set_run(self, run: Any) -> None:
        self.calls.append(run)

    @property
    def run(self) -> Any:
        return "the run"

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        self.calls.append((args, kwargs))
        return Message(args[0], dst_node_id=args[2], message_type=args[1])

    def get_node_ids(self) -> Iterable[int]:
        return [3, 4]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(f"id-{len(self.pushed)}")
            flower_patches.number(message, ids[-1])
            self.pushed.append(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies[number] for number in message_ids if number in self.replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        self.calls.append(timeout)
        return self.pull_messages(self.push_messages(messages))

    def reply(self, number: int, content: RecordDict | Error) -> None:
        """Answer the message that was pushed as this one."""
        request = self.pushed[number]
        self.replies[f"id-{number}"] = Message(content, reply_to=request)


@pytest.fixture
def inner() -> Scripted:
    return Scripted()


@pytest.fixture
def grid(inner: Scripted) -> PackedGrid:
    return PackedGrid(inner)


def request(node: int = 3) -> Message:
    content = RecordDict(
        {
            protocol.ARRAYS: ArrayRecord({"w": Array(SENT)}),
            protocol.CONFIG: ConfigRecord({protocol.RUN_ID: "r-1", protocol.SERVER_ROUND: 1}),
        }
    )
    return Message(content, dst_node_id=node, message_type="train", ttl=77.0, group_id="g")


def answer(bias: float = 1.0) -> RecordDict:
    return RecordDict(
        {
            protocol.ARRAYS: ArrayRecord({"w": Array(SENT + np.float32(bias))}),
            protocol.METRICS: MetricRecord({protocol.NUM_EXAMPLES: 5, protocol.TRAIN_LOSS: 0.5}),
            protocol.CONFIG: ConfigRecord(
                {protocol.RUN_ID: "r-1", protocol.SERVER_ROUND: 1, protocol.SITE: "clinic"}
            ),
        }
    )


EXPECTED = Expected("r-1", 1, {"w": SENT}, AdmissionSection())


def test_what_is_pushed_is_packed_and_addressed_as_before(
    grid: PackedGrid, inner: Scripted
) -> None:
    given = [request(3), request(4)]
    assert list(grid.push_messages(given)) == ["id-0", "id-1"]
    for mine, sent in zip(given, inner.pushed, strict=True):
        assert list(sent.content) == [packed.NAME]
        assert packed.unpack(sent.content) == mine.content
        for key in ("dst_node_id", "message_type", "ttl", "group_id"):
            assert getattr(sent.metadata, key) == getattr(mine.metadata, key)
        # A request is pushed again where it was lost, so it must stay as it is.
        assert list(mine.content) == [protocol.ARRAYS, protocol.CONFIG]


def test_replies_come_unpacked_and_plain_ones_as_they_are(
    grid: PackedGrid, inner: Scripted
) -> None:
    ids = list(grid.push_messages([request(n) for n in (3, 4, 5)]))
    inner.reply(0, packed.pack(answer()))
    inner.reply(1, answer())
    inner.reply(2, Error(code=413, reason="FE-413"))
    one, other, failed = grid.pull_messages(ids)
    assert one.content == other.content == answer()
    assert [r.metadata.reply_to_message_id for r in (one, other, failed)] == ids
    assert (one.metadata.src_node_id, failed.metadata.src_node_id) == (3, 5)
    assert failed.has_error()
    assert failed.error.code == 413


def test_a_reply_that_comes_later_is_simply_not_there_yet(
    grid: PackedGrid, inner: Scripted
) -> None:
    ids = list(grid.push_messages([request(3), request(4)]))
    inner.reply(1, packed.pack(answer()))
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages(ids)] == ids[1:]


@pytest.mark.parametrize("name", ["message_ids", "reply_to_message_ids"])
def test_both_names_for_the_ids_are_taken_and_the_inner_grid_is_called_with_neither(
    name: str,
) -> None:
    class Renamed(Scripted):
        """As Flower 1.43, to which ``message_ids`` is a name that goes."""

        def pull_messages(
            self, reply_to_message_ids: Any = None, *, message_ids: Any = None
        ) -> Iterable[Message]:
            assert message_ids is None
            assert reply_to_message_ids is not None, "would be everything"
            return super().pull_messages(reply_to_message_ids)

    for inner in (Scripted(), Renamed()):
        grid = PackedGrid(inner)
        ids = list(grid.push_messages([request(3)]))
        inner.reply(0, packed.pack(answer()))
        assert [r.content for r in grid.pull_messages(**{name: ids})] == [answer()]
        assert list(grid.pull_messages(**{name: []})) == []
        assert list(grid.pull_messages()) == []
        with pytest.raises(TypeError):
            grid.pull_messages(ids=ids)  # type: ignore[call-arg]


STRANGE = {
    "garbage": RecordDict({packed.NAME: ConfigRecord({packed.NAME: b"\xff" * 50})}),
    "a number": RecordDict({packed.NAME: ConfigRecord({packed.NAME: 7})}),
    "metrics": RecordDict({packed.NAME: MetricRecord({packed.NAME: 7})}),
    "nothing": RecordDict({packed.NAME: ArrayRecord({})}),
    "packed twice": packed.pack(packed.pack(answer())),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_cannot_be_unpacked_reaches_the_gate_and_is_refused_there(
    grid: PackedGrid, inner: Scripted, name: str
) -> None:
    ids = list(grid.push_messages([request(3), request(4)]))
    inner.reply(0, STRANGE[name])
    inner.reply(1, packed.pack(answer()))
    strange, good = grid.pull_messages(ids)
    verdict = admit_train(strange, "clinic", 10, EXPECTED)
    assert verdict.update is None
    assert verdict.rejection is not None
    assert verdict.rejection.code // 100 == 4
    # The twin: the neighbour's reply, which came through the same call, counts.
    assert admit_train(good, "clinic", 10, EXPECTED).update is not None


def test_one_call_for_both_ways_packs_and_unpacks(grid: PackedGrid, inner: Scripted) -> None:
    class Echo(Scripted):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [Message(packed.pack(answer()), reply_to=m) for m in self.pushed]

    echo = Echo()
    (reply,) = PackedGrid(echo).send_and_receive([request()], timeout=9.0)
    assert reply.content == answer()
    assert list(echo.pushed[0].content) == [packed.NAME]
    assert echo.calls == [9.0]


def test_a_message_without_content_goes_as_it_is(grid: PackedGrid, inner: Scripted) -> None:
    failed = Message(Error(code=1, reason="x"), reply_to=_numbered(request()))
    grid.push_messages([failed])
    assert inner.pushed == [failed]


def _numbered(message: Message) -> Message:
    flower_patches.number(message, "before")
    return message


def test_everything_else_is_passed_on(grid: PackedGrid, inner: Scripted) -> None:
    grid.set_run("run")  # type: ignore[arg-type]
    assert list(grid.get_node_ids()) == [3, 4]
    assert grid.run == "the run"
    assert grid.create_message(RecordDict(), "train", 3, "g", 5.0).metadata.dst_node_id == 3
    assert inner.calls == ["run", ((RecordDict(), "train", 3, "g", 5.0), {})]
