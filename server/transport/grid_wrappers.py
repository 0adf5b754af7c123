"""Wrappers around Flower's Grid: one passes every call on, the others change one or two calls of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedge.shared.wire import packed
from fedge.shared.wire.frames import WireError


class WrappedGrid(Grid):
    """A Grid that passes every call on; the base of those that change a few.

    Args:
        grid: the wrapped Grid.
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
        """Pass on."""
        return self._grid.push_messages(messages)

    def pull_messages(
        self,
        message_ids: Iterable[str] | None = None,
        *,
        reply_to_message_ids: Iterable[str] | None = None,
    ) -> Iterable[Message]:
        """Pass on, by position: Flower 1.43 names the ids ``reply_to_message_ids``."""
        return self._grid.pull_messages(message_ids or reply_to_message_ids or ())

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass on."""
        return self._grid.send_and_receive(messages, timeout=timeout)


_log = logging.getLogger(__name__)


class PackedGrid(WrappedGrid):
    """A Grid that packs pushed messages, unpacks pulled replies and passes everything else on.

    Args:
        grid: Flower's own.
    """

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push each message packed; the messages themselves are not changed."""
        return self._grid.push_messages([_packed(message) for message in messages])

    def pull_messages(
        self,
        message_ids: Iterable[str] | None = None,
        *,
        reply_to_message_ids: Iterable[str] | None = None,
    ) -> Iterable[Message]:
        """Pull replies; one that cannot be unpacked stays as it came, and the admission gate refuses it.

        Args:
            message_ids: ids of the requests.
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
        """Push each message packed, and unpack the replies."""
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


class CohortView(WrappedGrid):
    """Flower's Grid as a strategy sees it: only the nodes of this round's cohort exist.

    Flower's strategies sample in ``configure_train``, where the adaptive ones also store the current arrays; with this
    view they sample every node of the cohort.

    Args:
        grid: the wrapped Grid.
        node_ids: Flower's ids of the cohort's nodes.
    """

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        super().__init__(grid)
        self._node_ids = list(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of the cohort."""
        return list(self._node_ids)
