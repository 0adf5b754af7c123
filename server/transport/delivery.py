"""The delivery state of one exchange: what is under way to and from each node, when to retry and when to give up.

Requests and replies get lost: a SuperNode forgets what it holds when it stops, and Flower drops what it holds for a
site that is not connected, and a reply whose upload broke off; 1.43 does so without an error. A SuperNode handles one
message after the other, so where a small probe is answered while the reply is missing, the reply will not come, and
the request is sent once more. Requests are idempotent at a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from flwr.app import Array, Message, RecordDict

from fedge.server.transport.grid_calls import TimedGrid, no_op
from fedge.server.transport.node_status import NodeStatus
from fedge.server.transport.pending_pulls import PendingPulls
from fedge.shared import protocol

#: Seconds that Flower keeps a message beyond the deadline, to distinguish a late reply from none.
GRACE = 60.0
#: Maximum number of unexpected replies that an exchange records; a flood of them must not fill the memory.
_MAX_REPORTED = 1000
#: Flower's numbers for a site that is not connected, and for a ClientApp whose process died.
_NODE_UNAVAILABLE, _CLIENT_APP_CRASHED = 5, 8
#: Seconds until a request that Flower has dropped, or not stored, is sent again.
_PUSH_PAUSE = 2.0
#: How often in a row Flower may refuse to store a node's request until the exchange no longer waits for that node.
_MAX_REFUSALS = 3
#: Maximum ratio of an unanswered probe's lifetime to the first one's.
_MAX_PROBE = 8


@dataclass(frozen=True)
class DeliveryEvents:
    """Callbacks for what happens during an exchange; each does nothing unless given.

    Attributes:
        reply: a reply came; called with (node id, replies so far).
        pushed: all requests are sent.
        sent: a request was sent; called with (requests so far, all requests, bytes so far).
        waiting: called now and then with (node ids without a reply, seconds since the start).
        disconnected: a node is no longer connected; called with (node id, seconds since its request was sent).
        reconnected: a node is connected again; called with (node id, seconds that it was disconnected), for nodes
            without a request too.
    """

    reply: Callable[[int, int], None] = no_op
    pushed: Callable[[], None] = no_op
    sent: Callable[[int, int, int], None] = no_op
    waiting: Callable[[Sequence[int], float], None] = no_op
    disconnected: Callable[[int, float], None] = no_op
    reconnected: Callable[[int, float], None] = no_op


@dataclass
class _NodeState:
    """One node's delivery state: its request, and the copies of it and the probe that are under way."""

    request: Message
    pushed_at: float
    copies: set[str] = field(default_factory=set)
    probe: str | None = None
    probed_at: float = 0.0
    probes_lost: int = 0
    retries: int = 0
    refused: int = 0  # pushes in a row that were not stored; no copy is under way then
    probe_answered: bool = False  # since the last push
    done: bool = False


class Delivery:
    """The state of one exchange.

    Args:
        node_status: connection status of the nodes, with the client of the grid.
        requests: one request a node.
        deadline: seconds from now.
        probe: content of a probe; None for a grid that loses nothing.
        events: callbacks for the progress.

    Attributes:
        replies: node id -> reply that came within the deadline.
        late: ids of the nodes whose reply came after the deadline.
        duplicates: ids of the nodes that answered one request more than once.
        stray: ids of the nodes that replied to nothing that was sent here.
        sent, received: payload in bytes.
        retries: number of requests that were sent again.
    """

    def __init__(
        self,
        node_status: NodeStatus,
        requests: Sequence[Message],
        deadline: float,
        probe: RecordDict | None,
        events: DeliveryEvents,
    ) -> None:
        self.node_status, self.events = node_status, events
        self.grid_client = grid_client = node_status.grid_client
        self.clock, self.timeouts = grid_client.clock, grid_client.timeouts
        self.pending_pulls = PendingPulls(grid_client)
        self.deadline, self.probe = deadline, probe
        self.started = self.reported_at = self.clock.now()
        self.nodes = {m.metadata.dst_node_id: _NodeState(m, self.started) for m in requests}
        self.request_nodes: dict[str, int] = {}  # message id of a request to node
        self.probe_nodes: dict[str, int] = {}
        self.answered_ids: set[str] = set()
        self.replies: dict[int, Message] = {}
        self.late: list[int] = []
        self.duplicates: list[int] = []
        self.stray: list[int] = []
        self.sent = self.received = self.retries = 0

    @property
    def until(self) -> float:
        """Time of the deadline, by the clock."""
        return self.started + self.deadline

    def pending(self) -> list[int]:
        """Nodes that may still answer."""
        return [n for n, a in self.nodes.items() if not a.done and a.refused < _MAX_REFUSALS]

    def unsent(self) -> list[int]:
        """Nodes whose request the SuperLink has not stored."""
        return [node for node, a in self.nodes.items() if a.refused]

    def push_all(self) -> None:
        """Send every request, large ones one by one, so that the progress can be seen."""
        requests = [a.request for a in self.nodes.values()]
        each = max((payload_bytes(m) for m in requests), default=0)
        size = 1 if each > self.timeouts.large else max(len(requests), 1)
        for start in range(0, len(requests), size):
            some = requests[start : start + size]
            for message, number in zip(some, self._push(some), strict=True):
                self._note_push(message.metadata.dst_node_id, number)
            self.events.sent(start + len(some), len(requests), self.sent)
        self.events.pushed()

    def _push(self, messages: list[Message]) -> list[str | None]:
        grid = self.grid_client.grid
        given = self.grid_client.call(
            "send requests", lambda: list(grid.push_messages(messages)), self.until, self.tick
        )
        # Flower gives "" or None for a message that it did not store, and no ids at all where it took none.
        ids = [number or None for number in given] + [None] * (len(messages) - len(given))
        self.sent += sum(payload_bytes(m) for m, n in zip(messages, ids, strict=True) if n)
        return ids

    def _note_push(self, node: int, number: str | None) -> None:
        state = self.nodes[node]
        state.pushed_at = self.clock.now()
        if number:
            self.request_nodes[number] = node
            state.copies.add(number)
            state.refused = 0
        elif not state.copies:
            state.refused += 1

    def pull(self, pending: Iterable[int]) -> None:
        """Collect the replies of these nodes that have arrived."""
        for _ in range(2):
            groups = [sorted(self.nodes[node].copies) for node in pending]
            groups += [[p] for node in self.pending() if (p := self.nodes[node].probe)]
            if self.grid_client.direct:
                replies = self.grid_client.grid.pull_messages([i for ids in groups for i in ids])
                unreadable, failed = list[str](), False
            else:
                replies, unreadable, failed = self.pending_pulls.take(groups)
            for reply in replies:
                self._take(reply)
            for number in unreadable:
                self._take_unreadable(number)
            if not failed:
                return
            # Wait here until the SuperLink answers again, then pull once more: after the deadline nothing is pulled.
            self._look()

    def arriving(self) -> list[int]:
        """Nodes whose reply has begun to arrive, and is not complete."""
        held = self.pending_pulls.held
        return [node for node in self.pending() if held & self.nodes[node].copies]

    def _take(self, reply: Message) -> None:
        self.received += payload_bytes(reply)
        number, source = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
        node = self.request_nodes.get(number, self.probe_nodes.get(number))
        if node is None or (source != node and not reply.has_error()):
            self.stray.append(source)
            del self.stray[_MAX_REPORTED:]
            return
        state = self.nodes[node]
        # Flower itself answers for a site whose message is lost: then the source is not the site.
        of_site = source == node
        if number in self.probe_nodes:
            if state.probe == number:
                state.probe = None
                if of_site:
                    state.probe_answered, state.probes_lost = True, 0
        elif number in self.answered_ids:
            self.duplicates += [node] if of_site and len(self.duplicates) < _MAX_REPORTED else []
        elif not self._is_lost(reply, state, of_site=of_site):
            self.answered_ids.add(number)
            if not state.done:  # else another copy was answered before, which our retry has caused
                self._count(node, state, reply)
        else:
            state.copies.discard(number)
        if not of_site and reply.error.code == _NODE_UNAVAILABLE:
            self._mark_disconnected(node)

    def _take_unreadable(self, number: str) -> None:
        """Count an unreadable reply as an empty one: Flower does not give it a second time."""
        node = self.request_nodes.get(number, self.probe_nodes.get(number))
        if node is None:
            return
        state = self.nodes[node]
        if number == state.probe:
            state.probe = None
        elif number in self.request_nodes and not state.done:
            self.answered_ids.add(number)
            self._count(node, state, Message(RecordDict(), reply_to=state.request))

    def _is_lost(self, reply: Message, state: _NodeState, *, of_site: bool) -> bool:
        """Whether this reply only reports that the request, or the reply to it, is lost."""
        if self.grid_client.direct or not reply.has_error():
            return False
        may_retry = state.retries < self.timeouts.max_retries
        return not of_site or (may_retry and reply.error.code == _CLIENT_APP_CRASHED)

    def _count(self, node: int, state: _NodeState, reply: Message) -> None:
        state.done = True
        if (seconds := self.node_status.disconnected_for(node)) is not None:
            del self.node_status.disconnected[node]
            self.events.reconnected(node, seconds)
        grid = self.grid_client.grid
        taken = (
            grid.elapsed(reply) if isinstance(grid, TimedGrid) else self.clock.now() - self.started
        )
        if taken > self.deadline:
            self.late.append(node)
        else:
            self.replies[node] = reply
        self.events.reply(node, len(self.replies) + len(self.late))

    def _mark_disconnected(self, node: int) -> None:
        if self.node_status.mark_disconnected(node):
            self.events.disconnected(node, self.clock.now() - self.nodes[node].pushed_at)

    def look(self) -> None:
        """Check which nodes are connected, when the last check is old enough."""
        if self.node_status.due():
            self._look()

    def _look(self) -> None:
        disconnected, reconnected = self.node_status.look(self.pending(), self.until, self.tick)
        for node in disconnected:
            self.events.disconnected(node, self.clock.now() - self.nodes[node].pushed_at)
        for node, seconds in reconnected:
            self.events.reconnected(node, seconds)
            if node in self.nodes:
                self.nodes[node].probe = None  # it may have stopped with the node
                self.nodes[node].probed_at = 0.0

    def retry(self) -> None:
        """Send lost requests again, and probe nodes that have not replied for a while."""
        now = self.clock.now()
        for node in self.pending():
            state = self.nodes[node]
            if node in self.node_status.disconnected and not state.refused:
                continue
            dropped = not state.copies and now - state.pushed_at >= _PUSH_PAUSE
            if (state.probe_answered or dropped) and state.retries < self.timeouts.max_retries:
                self._retry_push(node, state)
                continue
            state.probe_answered = False
            life = self.timeouts.probe_life * min(2**state.probes_lost, _MAX_PROBE)
            if state.probe is not None and now - state.probed_at > life:
                state.probe, state.probes_lost = None, state.probes_lost + 1
            waited = now - max(state.pushed_at, state.probed_at)
            due = waited >= self.timeouts.probe_after
            if due and self.probe is not None and state.copies and not state.probe:
                self._push_probe(node, self.probe, state, life)

    def _retry_push(self, node: int, state: _NodeState) -> None:
        # A new message, as Flower identifies one by its content and creation time, and delivers it once.
        (number,) = self._push([self._fresh(state.request)])
        state.probe_answered = False
        state.retries += 1
        self.retries += 1
        self._note_push(node, number)

    def _fresh(self, request: Message) -> Message:
        left = max(self.until - self.clock.now(), 1.0)
        return Message(
            request.content,
            dst_node_id=request.metadata.dst_node_id,
            message_type=request.metadata.message_type,
            group_id=request.metadata.group_id,
            ttl=left + GRACE,
        )

    def _push_probe(self, node: int, probe: RecordDict, state: _NodeState, life: float) -> None:
        message = Message(
            probe,
            dst_node_id=node,
            message_type=protocol.PROBE,
            group_id=state.request.metadata.group_id,
            ttl=life,
        )
        (state.probe,) = self._push([message])
        state.probed_at = self.clock.now()
        if state.probe:
            self.probe_nodes[state.probe] = node

    def tick(self) -> None:
        """Report now and then that the exchange waits."""
        now = self.clock.now()
        if now - self.reported_at >= self.timeouts.reporting:
            self.reported_at = now
            self.events.waiting(self.pending(), now - self.started)


ConfigScalar: TypeAlias = bool | int | float | str | bytes


def payload_bytes(message: Message) -> int:
    """Size in bytes of the arrays, metrics and settings in a message; 0 where it has no content."""
    if not message.has_content():
        return 0
    return sum(
        len(key) + sum(_bytes_of(v) for v in (value if isinstance(value, list) else [value]))
        for record in message.content.values()
        for key, value in record.items()
    )


def _bytes_of(value: Array | ConfigScalar) -> int:
    # Flower's own count_bytes does the same, but raises at an empty text or list, which a site may send.
    if isinstance(value, Array):
        return len(value.data)
    if isinstance(value, str | bytes):
        return len(value)
    return 1 if isinstance(value, bool) else 8
