"""Flower's Grid with packed tensors on the line: one Array a message, see ``fedge.shared.packed``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedge.shared import packed, protocol
from fedge.shared.packed import UnpackableError

_log = logging.getLogger(__name__)


class PackedGrid(Grid):
    """Packs what is pushed, unpacks what is pulled, passes everything else on.

    Args:
        grid: Flower's own.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Pass on."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Pass on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages, each with its tensors packed; the messages given are left as they are."""
        # Sites get the same model: it is packed once.
        done: dict[int, ArrayRecord] = {}
        return self._grid.push_messages([_packed(message, done) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies; one that cannot be unpacked stays as it came, and the gate refuses it."""
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            _unpack(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push packed, and unpack what comes back."""
        done: dict[int, ArrayRecord] = {}
        packed_messages = [_packed(message, done) for message in messages]
        replies = list(self._grid.send_and_receive(packed_messages, timeout=timeout))
        for reply in replies:
            _unpack(reply)
        return replies


def _packed(message: Message, done: dict[int, ArrayRecord]) -> Message:
    record = message.content.get(protocol.ARRAYS) if message.has_content() else None
    if not isinstance(record, ArrayRecord):
        return message
    if id(record) not in done:
        done[id(record)] = packed.pack(record)
    metadata = message.metadata
    return Message(
        RecordDict({**message.content, protocol.ARRAYS: done[id(record)]}),
        dst_node_id=metadata.dst_node_id,
        message_type=metadata.message_type,
        ttl=metadata.ttl,
        group_id=metadata.group_id,
    )


def _unpack(reply: Message) -> None:
    record = reply.content.get(protocol.ARRAYS) if reply.has_content() else None
    if isinstance(record, ArrayRecord) and packed.is_packed(record):
        try:
            reply.content[protocol.ARRAYS] = packed.unpack(record)
        except UnpackableError as error:
            _log.warning("node %d: %s", reply.metadata.src_node_id, error)
