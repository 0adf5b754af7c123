"""The state of one exchange: what is under way to and from each node, and what to do where nothing comes.

Requests and replies get lost: a SuperNode forgets what it holds when it stops, and Flower drops what it holds for a
site that is not connected, and a reply whose upload broke off; 1.43 does so without a word. A SuperNode handles one
message after the other, so where a small probe is answered while the reply is missing, the reply will not come, and
the request is sent once more. Requests are idempotent at a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from flwr.app import Array, Message, RecordDict

from fedge.server.transport.grid_calls import TimedGrid, silent
from fedge.server.transport.node_status import NodeStatus
from fedge.server.transport.pulls import PendingPulls
from fedge.shared import protocol

#: Seconds that Flower keeps a message beyond the deadline, so that a late reply is told from none.
GRACE = 60.0
#: Replies out of turn that are told of in one exchange; a flood of them must not fill the memory.
_REPORTED = 1000
#: Flower's numbers for a site that is not connected, and for a ClientApp whose process died.
_NODE_UNAVAILABLE, _CLIENT_APP_CRASHED = 5, 8
#: Seconds until a request that Flower has dropped, or not stored, is sent again.
_PUSH_PAUSE = 2.0
#: How often in a row Flower may refuse to store a node's request, until nobody waits for that node any more.
_REFUSALS = 3
#: How much longer than the first an unanswered probe may live, at most.
_MAX_PROBE = 8


@dataclass(frozen=True)
class DeliveryEvents:
    """Who is told what while an exchange goes on.

    Attributes:
        reply: (node id, replies so far).
        pushed: all requests are out.
        sent: (requests so far, all requests, bytes so far).
        waiting: (node ids without a reply, seconds).
        lost: (node id, seconds since it was asked); it is no longer connected.
        back: (node id, seconds that it was away); told of nodes that were not asked, too.
    """

    reply: Callable[[int, int], None] = silent
    pushed: Callable[[], None] = silent
    sent: Callable[[int, int, int], None] = silent
    waiting: Callable[[Sequence[int], float], None] = silent
    lost: Callable[[int, float], None] = silent
    back: Callable[[int, float], None] = silent


@dataclass
class _Asked:
    """One node's part: its request, the copies of it that are under way, and the probe that is."""

    request: Message
    asked_at: float
    copies: set[str] = field(default_factory=set)
    probe: str | None = None
    probed_at: float = 0.0
    probes_lost: int = 0
    pushes_again: int = 0
    refused: int = 0  # pushes in a row that were not stored; no copy is under way then
    answered: bool = False  # a probe, since the last push
    done: bool = False


class Delivery:
    """The state of one exchange.

    Args:
        live: what is known of the nodes, and the grid.
        requests: one a node.
        deadline: seconds from now.
        probe: the content of a probe; None for a grid that loses nothing.
        watch: who is told.
    """

    def __init__(
        self,
        live: NodeStatus,
        requests: Sequence[Message],
        deadline: float,
        probe: RecordDict | None,
        watch: DeliveryEvents,
    ) -> None:
        self.live, self.link, self.watch = live, live.link, watch
        self.clock, self.patience = live.link.clock, live.link.patience
        self.fetches = PendingPulls(live.link)
        self.deadline, self.probe = deadline, probe
        self.started = self.told = self.clock.now()
        self.nodes = {m.metadata.dst_node_id: _Asked(m, self.started) for m in requests}
        self.main: dict[str, int] = {}  # message id to node
        self.probes: dict[str, int] = {}
        self.answered: set[str] = set()
        self.replies: dict[int, Message] = {}
        self.late: list[int] = []
        self.again: list[int] = []
        self.stray: list[int] = []
        self.sent = self.received = self.pushed_again = 0

    @property
    def until(self) -> float:
        """The deadline by the clock."""
        return self.started + self.deadline

    def pending(self) -> list[int]:
        """Nodes that may still answer."""
        return [n for n, a in self.nodes.items() if not a.done and a.refused < _REFUSALS]

    def unsent(self) -> list[int]:
        """Nodes of which the SuperLink has not stored the request."""
        return [node for node, a in self.nodes.items() if a.refused]

    def push_all(self) -> None:
        """Send every request, large ones one by one, so that the progress can be seen."""
        requests = [a.request for a in self.nodes.values()]
        each = max((payload_bytes(m) for m in requests), default=0)
        size = 1 if each > self.patience.large else max(len(requests), 1)
        for start in range(0, len(requests), size):
            some = requests[start : start + size]
            for message, number in zip(some, self._push(some), strict=True):
                self._pushed(message.metadata.dst_node_id, number)
            self.watch.sent(start + len(some), len(requests), self.sent)
        self.watch.pushed()

    def _push(self, messages: list[Message]) -> list[str | None]:
        grid = self.link.grid
        given = self.link.call(
            "send requests", lambda: list(grid.push_messages(messages)), self.until, self.tick
        )
        # Flower gives "" or None for a message that it did not store, and no ids at all where it took none.
        ids = [number or None for number in given] + [None] * (len(messages) - len(given))
        self.sent += sum(payload_bytes(m) for m, n in zip(messages, ids, strict=True) if n)
        return ids

    def _pushed(self, node: int, number: str | None) -> None:
        asked = self.nodes[node]
        asked.asked_at = self.clock.now()
        if number:
            self.main[number] = node
            asked.copies.add(number)
            asked.refused = 0
        elif not asked.copies:
            asked.refused += 1

    def pull(self, pending: Iterable[int]) -> None:
        """Take what has come for these nodes."""
        for _ in range(2):
            groups = [sorted(self.nodes[node].copies) for node in pending]
            groups += [[p] for node in self.pending() if (p := self.nodes[node].probe)]
            if self.link.direct:
                replies = self.link.grid.pull_messages([i for ids in groups for i in ids])
                unreadable, failed = list[str](), False
            else:
                replies, unreadable, failed = self.fetches.take(groups)
            for reply in replies:
                self._take(reply)
            for number in unreadable:
                self._take_unreadable(number)
            if not failed:
                return
            # Wait here until the SuperLink is back, then look once more: there may be no later, at the deadline.
            self._look()

    def arriving(self) -> list[int]:
        """Nodes whose reply has begun to arrive, and is not complete."""
        held = self.fetches.held
        return [node for node in self.pending() if held & self.nodes[node].copies]

    def _take(self, reply: Message) -> None:
        self.received += payload_bytes(reply)
        number, source = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
        node = self.main.get(number, self.probes.get(number))
        if node is None or (source != node and not reply.has_error()):
            self.stray.append(source)
            del self.stray[_REPORTED:]
            return
        asked = self.nodes[node]
        # Flower itself answers for a site whose message is lost: then the source is not the site.
        of_site = source == node
        if number in self.probes:
            if asked.probe == number:
                asked.probe = None
                if of_site:
                    asked.answered, asked.probes_lost = True, 0
        elif number in self.answered:
            self.again += [node] if of_site and len(self.again) < _REPORTED else []
        elif not self._is_lost(reply, asked, of_site=of_site):
            self.answered.add(number)
            if not asked.done:  # else another copy was answered before: our own doing
                self._count(node, asked, reply)
        else:
            asked.copies.discard(number)
        if not of_site and reply.error.code == _NODE_UNAVAILABLE:
            self._gone(node)

    def _take_unreadable(self, number: str) -> None:
        """Flower gives such a reply no second time: it counts as one that holds nothing."""
        node = self.main.get(number, self.probes.get(number))
        if node is None:
            return
        asked = self.nodes[node]
        if number == asked.probe:
            asked.probe = None
        elif number in self.main and not asked.done:
            self.answered.add(number)
            self._count(node, asked, Message(RecordDict(), reply_to=asked.request))

    def _is_lost(self, reply: Message, asked: _Asked, *, of_site: bool) -> bool:
        """Whether this says no more than that the request, or its reply, is lost."""
        if self.link.direct or not reply.has_error():
            return False
        may_push = asked.pushes_again < self.patience.pushes_again
        return not of_site or (may_push and reply.error.code == _CLIENT_APP_CRASHED)

    def _count(self, node: int, asked: _Asked, reply: Message) -> None:
        asked.done = True
        if (seconds := self.live.away(node)) is not None:
            del self.live.gone[node]
            self.watch.back(node, seconds)
        grid = self.link.grid
        taken = (
            grid.elapsed(reply) if isinstance(grid, TimedGrid) else self.clock.now() - self.started
        )
        if taken > self.deadline:
            self.late.append(node)
        else:
            self.replies[node] = reply
        self.watch.reply(node, len(self.replies) + len(self.late))

    def _gone(self, node: int) -> None:
        if self.live.mark_gone(node):
            self.watch.lost(node, self.clock.now() - self.nodes[node].asked_at)

    def look(self) -> None:
        """See who is connected, when it is time."""
        if self.live.due():
            self._look()

    def _look(self) -> None:
        lost, back = self.live.look(self.pending(), self.until, self.tick)
        for node in lost:
            self.watch.lost(node, self.clock.now() - self.nodes[node].asked_at)
        for node, seconds in back:
            self.watch.back(node, seconds)
            if node in self.nodes:
                self.nodes[node].probe = None  # it may have stopped with the node
                self.nodes[node].probed_at = 0.0

    def mend(self) -> None:
        """Repeat requests that are lost, and probe nodes that are silent."""
        now = self.clock.now()
        for node in self.pending():
            asked = self.nodes[node]
            if node in self.live.gone and not asked.refused:
                continue
            dropped = not asked.copies and now - asked.asked_at >= _PUSH_PAUSE
            if (asked.answered or dropped) and asked.pushes_again < self.patience.pushes_again:
                self._push_again(node, asked)
                continue
            asked.answered = False
            life = self.patience.probe_life * min(2**asked.probes_lost, _MAX_PROBE)
            if asked.probe is not None and now - asked.probed_at > life:
                asked.probe, asked.probes_lost = None, asked.probes_lost + 1
            silent_for = now - max(asked.asked_at, asked.probed_at)
            due = silent_for >= self.patience.probe_after
            if due and self.probe is not None and asked.copies and not asked.probe:
                self._push_probe(node, self.probe, asked, life)

    def _push_again(self, node: int, asked: _Asked) -> None:
        # Anew, as Flower knows a message by what it holds, its time included, and delivers it once.
        (number,) = self._push([self._fresh(asked.request)])
        asked.answered = False
        asked.pushes_again += 1
        self.pushed_again += 1
        self._pushed(node, number)

    def _fresh(self, request: Message) -> Message:
        left = max(self.until - self.clock.now(), 1.0)
        return Message(
            request.content,
            dst_node_id=request.metadata.dst_node_id,
            message_type=request.metadata.message_type,
            group_id=request.metadata.group_id,
            ttl=left + GRACE,
        )

    def _push_probe(self, node: int, probe: RecordDict, asked: _Asked, life: float) -> None:
        message = Message(
            probe,
            dst_node_id=node,
            message_type=protocol.PROBE,
            group_id=asked.request.metadata.group_id,
            ttl=life,
        )
        (asked.probe,) = self._push([message])
        asked.probed_at = self.clock.now()
        if asked.probe:
            self.probes[asked.probe] = node

    def tick(self) -> None:
        """Tell now and then that we wait."""
        now = self.clock.now()
        if now - self.told >= self.patience.telling:
            self.told = now
            self.watch.waiting(self.pending(), now - self.started)


ConfigScalar: TypeAlias = bool | int | float | str | bytes


def payload_bytes(message: Message) -> int:
    """Bytes of arrays, metrics and settings in a message."""
    if not message.has_content():
        return 0
    return sum(
        len(key) + sum(_bytes_of(v) for v in (value if isinstance(value, list) else [value]))
        for record in message.content.values()
        for key, value in record.items()
    )


def _bytes_of(value: Array | ConfigScalar) -> int:
    # Flower's own count_bytes does the same, but raises at an empty text or list, which a site may well send.
    if isinstance(value, Array):
        return len(value.data)
    if isinstance(value, str | bytes):
        return len(value)
    return 1 if isinstance(value, bool) else 8
