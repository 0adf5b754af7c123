"""Flower's public Grid in one process: the ServerApp and ClientApp of a deployment, by direct calls.

No polling, no serialisation, one reply a pull: so progress shows site by site, an interrupt is noticed between two
sites, and the round loop runs exactly as over a network. Sites run one after the other, but each is charged only its
own time, as if it had a machine of its own.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from copy import copy, deepcopy
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedge.simulations import flower_patches

_log = logging.getLogger(__name__)

#: Flower's own number for an exception in a ClientApp.
_CLIENT_APP_RAISED = 2


class InProcessGrid(Grid):
    """A grid whose nodes are sites of this process.

    Args:
        sites: node id to site name.
        app: the ClientApp that all of them run.
        run_id: of the Flower run, which here is only a number.
    """

    def __init__(self, sites: Mapping[int, str], app: ClientApp, run_id: int = 1) -> None:
        self._app = app
        self._run_id = run_id
        self._contexts = {
            node: Context(run_id, node, {"site": site}, RecordDict(), {})
            for node, site in sites.items()
        }
        self._waiting: dict[str, Message] = {}
        self._seconds: dict[str, float] = {}
        self._ids = itertools.count(1)
        flower_patches.identify(run_id, 0)

    def set_run(self, run: Any) -> None:
        """Take the id of the Flower run.

        Args:
            run: Flower's Run.
        """
        self._run_id = run.run_id
        flower_patches.identify(self._run_id, 0)

    @property
    def run(self) -> Any:
        """Refused: there is no SuperLink that could describe the run."""
        raise LookupError("a simulation has no SuperLink, so there is no Flower Run to return")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message of this run."""
        return Message(
            content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl
        )

    def get_node_ids(self) -> Iterable[int]:
        """All sites' nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; a site starts on its own when its reply is pulled."""
        ids = []
        for message in messages:
            message_id = f"m-{next(self._ids)}"
            flower_patches.number(message, message_id)
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(
        self,
        message_ids: Iterable[str] | None = None,
        *,
        reply_to_message_ids: Iterable[str] | None = None,
    ) -> Iterable[Message]:
        """Let the next site of these messages work, and return its reply.

        Args:
            message_ids: of the requests.
            reply_to_message_ids: the same, as Flower 1.43 names them.
        """
        for message_id in message_ids or reply_to_message_ids or ():
            if message_id in self._waiting:
                return [self._answer(message_id, self._waiting.pop(message_id))]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull until every reply is here, or until the sites' time exceeds ``timeout`` in seconds."""
        ids = list(self.push_messages(messages))
        replies = [reply for _ in ids for reply in self.pull_messages(ids)]
        return [r for r in replies if timeout is None or self.elapsed(r) <= timeout]

    def elapsed(self, reply: Message) -> float:
        """Seconds that the site worked on this reply."""
        return self._seconds.get(reply.metadata.reply_to_message_id, 0.0)

    def _answer(self, message_id: str, message: Message) -> Message:
        started = time.monotonic()
        context = self._contexts.get(message.metadata.dst_node_id)
        try:
            if context is None:
                raise LookupError(f"no node {message.metadata.dst_node_id}")
            reply = self._app(_as_delivered(message), context)
        except Exception:
            # As Flower's runtime does; but the text of a site's exception stays at the site.
            _log.exception("node %d: the ClientApp raised", message.metadata.dst_node_id)
            reply = Message(
                Error(code=_CLIENT_APP_RAISED, reason="the ClientApp raised"), reply_to=message
            )
        flower_patches.number(reply, f"{message_id}-reply")
        self._seconds[message_id] = time.monotonic() - started
        return reply


def _as_delivered(message: Message) -> Message:
    """The message with content of its own, as over a network: what a site does to it is invisible to the others.

    Only the records are copied; the tensors' bytes cannot change and are shared.
    """
    delivered = copy(message)
    if message.has_content():
        delivered.content = deepcopy(message.content)
    return delivered
