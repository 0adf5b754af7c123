"""Forwards requests from Flower's ClientApp to the site's worker, and returns its replies.

Neither torch nor data is imported here, so a message does not pay for starting a framework, and code that a
server ships has no access to the examples. A link may be a direct call (one process) or a socket
to a resident worker (``fedge.client.relay.worker_client``).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Protocol

from flwr.app import Context, Error, Message, RecordDict

from fedge.client.relay.worker_client import SOCKET_VARIABLE, SocketLink, deadline_of_environment
from fedge.shared.errors import FedgeError
from fedge.shared.wire import packed
from fedge.shared.wire.frames import WireError

log = logging.getLogger(__name__)

#: Key of a node's configuration that names the site.
NODE_SITE = "site"
UNREACHABLE, REFUSED = 413, 414


class Link(Protocol):
    """A connection to one site's worker."""

    def exchange(self, kind: str, content: RecordDict) -> RecordDict:
        """Deliver a request and return the reply, within the link's own deadline.

        Args:
            kind: the message type, see ``fedge.shared.protocol``.
            content: of the request.

        Raises:
            SiteError: the worker's own refusal, or 420 where it does not answer.
        """


class Worker(Protocol):
    """Answers requests at a site."""

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        """Answer a request.

        Raises:
            FedgeError: the request is refused or failed; the number says why.
        """


class DirectLink:
    """A link to a worker in the same process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def exchange(self, kind: str, content: RecordDict) -> RecordDict:
        """Call the worker."""
        return self._worker.answer(kind, content)


_links: dict[str, Link] = {}


def connect(site: str, link: Link) -> None:
    """Send the site's messages over this link from now on."""
    _links[site] = link


def disconnect(site: str) -> None:
    """Remove the site's link; its messages are answered with an error from now on."""
    _links.pop(site, None)


def forward(message: Message, context: Context) -> Message:
    """Pass a message to the worker of the site that the node's configuration names.

    The worker is the one connected in this process, else the one whose socket the environment names.

    Returns:
        The worker's reply, or Flower's ``Error`` with fedge's number alone where the worker refuses,
        there is none, or the link fails: the text stays in this site's log.
    """
    site = str(context.node_config.get(NODE_SITE, ""))
    link = _links.get(site) or _resident()
    if link is None:
        log.error("site %s: no worker is connected", site)
        return _failed(message, UNREACHABLE)
    try:
        content, was_packed = _unpacked(message)
        reply = link.exchange(message.metadata.message_type, content)
        return Message(packed.pack(reply) if was_packed else reply, reply_to=message)
    except WireError as error:
        log.error("site %s: FE-%d %s", site, REFUSED, error)
        return _failed(message, REFUSED)
    except FedgeError as error:
        log.error("site %s: %s", site, error)
        return _failed(message, error.code)
    except Exception:
        log.exception("site %s: the link to the worker failed", site)
        return _failed(message, UNREACHABLE)


def _unpacked(message: Message) -> tuple[RecordDict, bool]:
    """The request's content record by record, and whether it came packed."""
    content = message.content if message.has_content() else RecordDict()
    if packed.is_packed(content):
        return packed.unpack(content), True
    return content, False


def _resident() -> Link | None:
    path = os.environ.get(SOCKET_VARIABLE)
    return SocketLink(Path(path), deadline_of_environment()) if path else None


def _failed(message: Message, code: int) -> Message:
    return Message(Error(code=code, reason=f"FE-{code}"), reply_to=message)
