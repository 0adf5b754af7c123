"""One exchange over Flower's Grid: push requests, pull replies until all are here or the deadline has passed.

``Grid.send_and_receive`` polls every three seconds and has no timeout by default, so the public ``push_messages``
and ``pull_messages`` are used directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedge.server.transport.delivery import Delivery, DeliveryEvents
from fedge.server.transport.grid_calls import GridClient
from fedge.server.transport.node_status import NodeStatus

#: Seconds between two pulls: a share of those without a reply, within bounds. A pull costs the SuperLink some 20 ms.
_FIRST_PAUSE, _LAST_PAUSE, _SHARE = 0.05, 1.0, 0.1


@dataclass(frozen=True)
class Exchange:
    """The outcome of one exchange.

    Attributes:
        replies: node id -> reply that came within the deadline.
        late: ids of the nodes whose reply came after the deadline.
        timed_out: ids of the nodes without a reply.
        duplicates: ids of the nodes that answered one request more than once; the first reply counts.
        stray: ids of the nodes that replied to nothing that was sent here; of these, as of ``duplicates``, the first
            thousand.
        sent, received: payload in bytes.
        disconnected: of ``timed_out``, the disconnected nodes: node id -> seconds since the connection was lost.
        unsent: of ``timed_out``, the nodes for which the SuperLink took no request.
        arriving: of ``timed_out``, the nodes whose reply had begun to arrive and was not complete.
        retries: number of requests that were sent again.
    """

    replies: dict[int, Message]
    late: tuple[int, ...]
    timed_out: tuple[int, ...]
    duplicates: tuple[int, ...]
    stray: tuple[int, ...]
    sent: int
    received: int
    disconnected: dict[int, float] = field(default_factory=dict)
    unsent: tuple[int, ...] = ()
    arriving: tuple[int, ...] = ()
    retries: int = 0


def exchange(
    node_status: NodeStatus | Grid,
    requests: Sequence[Message],
    deadline: float,
    events: DeliveryEvents | None = None,
    probe: RecordDict | None = None,
) -> Exchange:
    """Send every request and collect the replies.

    Args:
        node_status: connection status of the nodes, with the client of the grid; or Flower's grid alone.
        requests: one request a node.
        deadline: seconds from now.
        events: callbacks for the progress.
        probe: content of a probe; None for a grid that loses nothing.

    Raises:
        RunError: 501, the SuperLink does not answer.
    """
    if isinstance(node_status, Grid):
        node_status = NodeStatus(GridClient(node_status))
    clock, direct = node_status.grid_client.clock, node_status.grid_client.direct
    delivery = Delivery(node_status, requests, deadline, probe, events or DeliveryEvents())
    delivery.push_all()
    if not direct:
        node_status.wait_for_next()
    last_reply_at = clock.now()
    while pending := delivery.pending():
        pulled_at = clock.now()
        delivery.pull(pending)
        took = clock.now() - pulled_at
        left = delivery.until - clock.now()
        if len(delivery.pending()) < len(pending):
            last_reply_at = clock.now()
            if direct or left > 0:
                continue
        # No pending node has replied: a flood of stray replies must not extend the exchange beyond the deadline.
        if left <= 0:
            break
        if not direct:
            delivery.look()
            delivery.retry()
        delivery.tick()
        # Many sites are many calls: leave the SuperLink as much time for other clients as these calls took.
        pause = max(_FIRST_PAUSE, took, _SHARE * (clock.now() - last_reply_at))
        clock.sleep(min(pause, _LAST_PAUSE, max(left, 0.0)))
    timed_out = tuple(node for node, state in delivery.nodes.items() if not state.done)
    return Exchange(
        delivery.replies,
        tuple(delivery.late),
        timed_out,
        tuple(delivery.duplicates),
        tuple(delivery.stray),
        delivery.sent,
        delivery.received,
        {n: s for n in timed_out if (s := node_status.disconnected_for(n)) is not None},
        tuple(delivery.unsent()),
        tuple(delivery.arriving()),
        delivery.retries,
    )


def no_reply_reason(result: Exchange, node: int, deadline: float) -> str:
    """Explain, for the round's record, why a node has not replied.

    Args:
        result: outcome of the exchange.
        node: id of a node in ``result.timed_out``.
        deadline: of the exchange, in seconds.
    """
    if node in result.disconnected:
        return f"not connected for {result.disconnected[node]:.0f} s"
    if node in result.unsent:
        return "the SuperLink takes no requests for it"
    if node in result.arriving:
        return f"connected, but its reply was not complete within {deadline:g} s"
    return f"connected, but no reply within {deadline:g} s"
