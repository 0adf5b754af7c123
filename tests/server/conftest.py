"""What the round loop's tests share: a small model, sites that drift, and a list of nodes as a Grid."""

from __future__ import annotations

import gc
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedge.server.aggregation.updates import Update
from fedge.simulations import flower_patches


@pytest.fixture(autouse=True)
def flower_identity() -> None:
    """Messages of the tests are the server's, as within a ServerApp."""
    flower_patches.identify(1, 0)


@pytest.fixture(autouse=True)
def heap_set_aside() -> Iterator[None]:
    """As in a run: some of Flower's strategies collect garbage at every tensor, and torch's heap is large."""
    gc.freeze()
    yield
    gc.unfreeze()


class Nodes(Grid):
    """A Grid that knows its nodes; every call that sends fails."""

    def __init__(self, count: int) -> None:
        self.count = count

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.count + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError


@pytest.fixture
def nodes() -> Callable[[int], Grid]:
    return Nodes


@pytest.fixture
def model() -> dict[str, np.ndarray[Any, Any]]:
    """A matrix, a vector, a scalar, and a tensor of float64."""
    rng = np.random.default_rng(0)
    return {
        "fc.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "fc.bias": rng.normal(size=3).astype(np.float32),
        "scale": np.asarray(0.75, dtype=np.float32),
        "wide": rng.normal(size=2),
    }


@pytest.fixture
def counted(model: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """The model with an integer buffer, as a normalisation layer has."""
    return {**model, "batches": np.asarray(3, dtype=np.int64)}


Sites = Callable[..., tuple[Update, ...]]


@pytest.fixture
def sites() -> Sites:
    """What seven sites of unlike size bring in a round: they drift apart, and together."""

    def bring(
        server_round: int,
        arrays: dict[str, np.ndarray[Any, Any]],
        *,
        count: int = 7,
        control: Container[str] = (),
    ) -> tuple[Update, ...]:
        updates = []
        for i in range(count):
            rng = np.random.default_rng((server_round, i))
            own = {
                k: np.asarray(
                    a + rng.integers(0, 9)
                    if a.dtype.kind == "i"
                    else a + rng.normal(0.3 * server_round, 0.5, a.shape),
                    dtype=a.dtype,
                )
                for k, a in arrays.items()
            }
            own |= {
                f"control/{k}": rng.normal(0.1, 0.2, arrays[k].shape).astype(arrays[k].dtype)
                for k in arrays
                if k in control
            }
            updates.append(Update(f"site-{i + 1}", own, 10 + 7 * i, 0.2 + 0.1 * i))
        return tuple(updates)

    return bring


class FakeTime:
    """A clock that takes no time: sleeping moves it."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += max(seconds, 0.001)


class SuperLink(Grid):
    """A SuperLink and its SuperNodes as Flower 1.41 and 1.42 have them, in a time of its own.

    A site handles one message after the other. While it is down it handles none, what it held is lost, and 60 s after
    it went down it is not listed: then Flower answers for it, and forgets the request. Flower 1.43 does neither, nor
    does it report that a reply is lost: set ``reports_loss`` to False.

    Args:
        time: the clock.
        answer: what a site replies to a message.
        nodes: ids; ``work`` seconds a training, one second anything else.
    """

    def __init__(
        self,
        time: FakeTime,
        answer: Callable[[Message], Message | None],
        nodes: Iterable[int],
        work: float = 3.0,
    ) -> None:
        self.time, self.answer, self.work = time, answer, work
        self.queues: dict[int, list[tuple[float, Message]]] = {n: [] for n in nodes}
        self.free = dict.fromkeys(self.queues, 0.0)
        self.down: dict[int, list[tuple[float, float]]] = {n: [] for n in self.queues}
        self.since = dict.fromkeys(self.queues, 0.0)
        self.failing: list[tuple[float, float, BaseException]] = []
        self.ready: dict[str, tuple[float, Message]] = {}
        self.where: dict[str, int] = {}
        self.pushed: list[Message] = []
        self.lose: Callable[[Message], bool] = lambda message: False
        self.lose_reply: Callable[[Message], bool] = lambda message: False
        self.slower: Callable[[Message], float] = lambda message: 0.0
        #: Requests that are not stored, and those whose reply was announced and never came whole.
        self.refuse: Callable[[Message], bool] = lambda message: False
        self.incomplete: Callable[[Message], bool] = lambda message: False
        self.reports_loss = True

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        raise NotImplementedError

    def _fails(self) -> None:
        for begin, end, error in self.failing:
            if begin <= self.time.time < end:
                raise error

    def listed(self, node: int) -> bool:
        now = self.time.time
        up = self.since[node] <= now
        return up and not any(a + 60 <= now < b for a, b in self.down[node])

    def get_node_ids(self) -> Iterable[int]:
        self._fails()
        return [n for n in self.queues if self.listed(n)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._fails()
        ids = []
        for message in messages:
            if self.refuse(message):
                ids.append("")
                continue
            ids.append(f"m{len(self.pushed)}")
            flower_patches.number(message, ids[-1])
            self.pushed.append(message)
            self.where[ids[-1]] = message.metadata.dst_node_id
            self.queues[message.metadata.dst_node_id].append((self.time.time, message))
        return ids

    def _work(self, node: int) -> None:
        queue = self.queues[node]
        while queue:
            pushed, message = queue[0]
            begin = max(pushed, self.free[node])
            begin = next((b for a, b in self.down[node] if a <= begin < b), begin)
            if begin > self.time.time:
                return
            queue.pop(0)
            expires = message.metadata.ttl + pushed
            if begin > expires:
                continue
            end = begin + (self.work if message.metadata.message_type == "train" else 1.0)
            end += self.slower(message)
            stop = next(((a, b) for a, b in self.down[node] if begin < a < end), None)
            self.free[node] = stop[1] if stop else end
            if stop is None and not self.lose(message):
                reply = self.answer(message)
                if reply is not None and not self.lose_reply(message):
                    self.ready[message.metadata.message_id] = (end, reply)

    # By position alone, as releases of Flower name the ids differently.
    def pull_messages(self, message_ids: Iterable[str], /) -> Iterable[Message]:
        self._fails()
        for node in self.queues:
            self._work(node)
        replies = []
        for number in message_ids:
            assert number, "a message that was not stored is asked for"
            node = self.where.get(number)
            if self.reports_loss and node is not None and not self.listed(node):
                replies.append(self._flower_says(number, 5))
                self.queues[node] = [
                    q for q in self.queues[node] if q[1].metadata.message_id != number
                ]
                self.where.pop(number)
                self.ready.pop(number, None)
            elif self.reports_loss and node is None:
                replies.append(self._flower_says(number, 3))
            elif number in self.ready and self.ready[number][0] <= self.time.time:
                reply = self.ready.pop(number)[1]
                self.where.pop(number)
                if not self.incomplete(self._request(number)):
                    replies.append(reply)
                elif self.reports_loss:
                    replies.append(self._flower_says(number, 3))
        return replies

    def _request(self, number: str) -> Message:
        return next(m for m in self.pushed if m.metadata.message_id == number)

    def _flower_says(self, number: str, code: int) -> Message:
        error = Message(Error(code=code, reason="unavailable"), reply_to=self._request(number))
        error.metadata.__dict__["_src_node_id"] = 1 << 60
        return error


@pytest.fixture
def fake_time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def superlink() -> type[SuperLink]:
    return SuperLink
