"""One exchange over Flower's Grid: push requests, pull replies until all are here or the deadline has passed.

``Grid.send_and_receive`` polls every three seconds and waits for ever by default, so the public ``push_messages``
and ``pull_messages`` are used directly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from flwr.app import Array, Message
from flwr.serverapp import Grid

_FIRST_PAUSE, _LAST_PAUSE = 0.02, 0.5
#: Replies out of turn that are told of in one exchange; a flood of them must not fill the memory.
_REPORTED = 1000

ConfigScalar: TypeAlias = bool | int | float | str | bytes


@runtime_checkable
class TimedGrid(Protocol):
    """A grid that knows how long a site took (a simulation, where sites wait for each other)."""

    def elapsed(self, reply: Message) -> float:
        """Seconds from the request to this reply."""
        ...


@dataclass(frozen=True)
class Exchange:
    """What came back.

    Attributes:
        replies: one a node, within the deadline.
        late: node ids whose reply came after it.
        absent: node ids without a reply.
        again: node ids that answered more than once; the first reply counts.
        stray: node ids that replied to nothing that was asked here (as ``again``, the first thousand).
        sent, received: payload in bytes.
    """

    replies: dict[int, Message]
    late: tuple[int, ...]
    absent: tuple[int, ...]
    again: tuple[int, ...]
    stray: tuple[int, ...]
    sent: int
    received: int


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


def exchange(
    grid: Grid,
    requests: Sequence[Message],
    deadline: float,
    on_reply: Callable[[int, int], None] | None = None,
    on_pushed: Callable[[], None] | None = None,
) -> Exchange:
    """Send every request and collect what comes back.

    Args:
        grid: Flower's.
        requests: one a node.
        deadline: seconds from now.
        on_reply: called with (node id, replies so far) when a reply was pulled.
        on_pushed: called when all requests are out.
    """
    started = time.monotonic()
    sent = sum(payload_bytes(m) for m in requests)
    destinations = [m.metadata.dst_node_id for m in requests]
    ids: list[str | None] = list(grid.push_messages(requests))
    # Flower gives no id for a message that could not be sent, and no ids at all where none could.
    ids += [None] * (len(destinations) - len(ids))
    asked = {i: node for i, node in zip(ids, destinations, strict=True) if i}
    unsent = [node for i, node in zip(ids, destinations, strict=True) if not i]
    pending = dict(asked)
    if on_pushed is not None:
        on_pushed()

    replies: dict[int, Message] = {}
    late: list[int] = []
    again: list[int] = []
    stray: list[int] = []
    received = 0
    pause = _FIRST_PAUSE
    while pending:
        waited_for = len(pending)
        for reply in grid.pull_messages(list(pending)):
            received += payload_bytes(reply)
            node = asked.get(reply.metadata.reply_to_message_id)
            # Flower itself answers for a site whose reply was lost: then the source is not the site.
            if node is None or (reply.metadata.src_node_id != node and not reply.has_error()):
                stray.append(reply.metadata.src_node_id)
                del stray[_REPORTED:]
                continue
            if pending.pop(reply.metadata.reply_to_message_id, None) is None:
                again.append(node)
                del again[_REPORTED:]
                continue
            taken = (
                grid.elapsed(reply) if isinstance(grid, TimedGrid) else time.monotonic() - started
            )
            if taken > deadline:
                late.append(node)
            else:
                replies[node] = reply
            if on_reply is not None:
                on_reply(node, len(replies) + len(late))
        if len(pending) == waited_for:
            # Whatever came, nothing of it was waited for: a flood of strays must not outlive the deadline.
            left = started + deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _LAST_PAUSE)
        else:
            pause = _FIRST_PAUSE
    absent = (*unsent, *pending.values())
    return Exchange(replies, tuple(late), absent, tuple(again), tuple(stray), sent, received)
