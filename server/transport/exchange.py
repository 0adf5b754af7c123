"""One exchange over Flower's Grid: push requests, pull replies until all are here or the deadline has passed.

``Grid.send_and_receive`` polls every three seconds and waits for ever by default, so the public ``push_messages``
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
    """What came back.

    Attributes:
        replies: one a node, within the deadline.
        late: node ids whose reply came after it.
        absent: node ids without a reply.
        again: node ids that answered one request more than once; the first reply counts.
        stray: node ids that replied to nothing that was asked here (as ``again``, the first thousand).
        sent, received: payload in bytes.
        away: by absent node, for how many seconds it has not been connected.
        unsent: absent nodes for which the SuperLink took no request.
    arriving: absent nodes whose reply had begun to arrive and was not complete.
        pushed_again: requests that were sent once more.
    """

    replies: dict[int, Message]
    late: tuple[int, ...]
    absent: tuple[int, ...]
    again: tuple[int, ...]
    stray: tuple[int, ...]
    sent: int
    received: int
    away: dict[int, float] = field(default_factory=dict)
    unsent: tuple[int, ...] = ()
    arriving: tuple[int, ...] = ()
    pushed_again: int = 0


def exchange(
    live: NodeStatus | Grid,
    requests: Sequence[Message],
    deadline: float,
    watch: DeliveryEvents | None = None,
    probe: RecordDict | None = None,
) -> Exchange:
    """Send every request and collect what comes back.

    Args:
        live: Flower's grid, with what is known of its nodes.
        requests: one a node.
        deadline: seconds from now.
        watch: who is told.
        probe: the content of a probe; None for a grid that loses nothing.

    Raises:
        RunError: 501, the SuperLink does not answer.
    """
    live = NodeStatus(GridClient(live)) if isinstance(live, Grid) else live
    clock, direct = live.link.clock, live.link.direct
    of = Delivery(live, requests, deadline, probe, watch or DeliveryEvents())
    of.push_all()
    if not direct:
        live.wait_for_next()
    news = clock.now()
    while pending := of.pending():
        asked_at = clock.now()
        of.pull(pending)
        took = clock.now() - asked_at
        left = of.until - clock.now()
        if len(of.pending()) < len(pending):
            news = clock.now()
            if direct or left > 0:
                continue
        # Whatever came, nothing of it was waited for: a flood of strays must not outlive the deadline.
        if left <= 0:
            break
        if not direct:
            of.look()
            of.mend()
        of.tick()
        # Many sites are many calls: the SuperLink shall have as long for others as for us.
        pause = max(_FIRST_PAUSE, took, _SHARE * (clock.now() - news))
        clock.sleep(min(pause, _LAST_PAUSE, max(left, 0.0)))
    absent = tuple(node for node, asked in of.nodes.items() if not asked.done)
    return Exchange(
        of.replies,
        tuple(of.late),
        absent,
        tuple(of.again),
        tuple(of.stray),
        of.sent,
        of.received,
        {n: s for n in absent if (s := live.away(n)) is not None},
        tuple(of.unsent()),
        tuple(of.arriving()),
        of.pushed_again,
    )


def absence(result: Exchange, node: int, deadline: float) -> str:
    """Why there is no reply of a node that was asked."""
    if node in result.away:
        return f"not connected for {result.away[node]:.0f} s"
    if node in result.unsent:
        return "the SuperLink takes no requests for it"
    if node in result.arriving:
        return f"connected, but its reply was not complete within {deadline:g} s"
    return f"connected, but no reply within {deadline:g} s"
