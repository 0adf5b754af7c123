"""Flower's Grid with packed contents on the line: one record a message, see ``fedge.shared.packed``."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flwr.app import Message

from fedge.server.wrapped_grid import WrappedGrid
from fedge.shared import packed
from fedge.shared.wire import WireError

_log = logging.getLogger(__name__)


class PackedGrid(WrappedGrid):
    """Packs what is pushed, unpacks what is pulled, passes everything else on.

    Args:
        grid: Flower's own.
    """

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages, each packed; the messages given are left as they are."""
        return self._grid.push_messages([_packed(message) for message in messages])

    def pull_messages(
        self,
        message_ids: Iterable[str] | None = None,
        *,
        reply_to_message_ids: Iterable[str] | None = None,
    ) -> Iterable[Message]:
        """Pull replies; one that cannot be unpacked stays as it came, and the gate refuses it.

        Args:
            message_ids: of the requests.
            reply_to_message_ids: the same, as Flower 1.43 names them.
        """
        # By position, as the inner grid's name for them depends on the release.
        replies = list(self._grid.pull_messages(message_ids or reply_to_message_ids or ()))
        for reply in replies:
            _unpack(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push packed, and unpack what comes back."""
        sent = [_packed(message) for message in messages]
        replies = list(self._grid.send_and_receive(sent, timeout=timeout))
        for reply in replies:
            _unpack(reply)
        return replies


def _packed(message: Message) -> Message:
    if not message.has_content():
        return message
    metadata = message.metadata
    return Message(
        packed.pack(message.content),
        dst_node_id=metadata.dst_node_id,
        message_type=metadata.message_type,
        ttl=metadata.ttl,
        group_id=metadata.group_id,
    )


def _unpack(reply: Message) -> None:
    if reply.has_content() and packed.is_packed(reply.content):
        try:
            reply.content = packed.unpack(reply.content)
        except WireError as error:
            _log.warning("node %d: %s", reply.metadata.src_node_id, error)
