"""The way from Flower's ClientApp to the site's worker: pass the message on, return its answer.

Neither torch nor data is imported here, so a message costs no start of a framework, and code that a
server ships stands nowhere near the examples. A link may be a direct call (one process) or a socket
to a resident worker.
"""

from __future__ import annotations

import logging
from typing import Protocol

from flwr.app import Context, Error, Message

log = logging.getLogger(__name__)

#: Key of a node's configuration that names the site.
NODE_SITE = "site"
UNREACHABLE = 413


class Link(Protocol):
    """A way to one site's worker."""

    def exchange(self, message: Message) -> Message:
        """Deliver a request and return the reply, within the link's own deadline."""


class Worker(Protocol):
    """What answers requests at a site."""

    def handle(self, request: Message) -> Message:
        """Answer a request; raises nothing."""


class DirectLink:
    """A worker in this very process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def exchange(self, message: Message) -> Message:
        """Call the worker."""
        return self._worker.handle(message)


_links: dict[str, Link] = {}


def connect(site: str, link: Link) -> None:
    """Send the site's messages over this link from now on."""
    _links[site] = link


def disconnect(site: str) -> None:
    """Forget the site's link; its messages are answered with an error from now on."""
    _links.pop(site, None)


def forward(message: Message, context: Context) -> Message:
    """Pass a message to the worker of the site that the node's configuration names.

    Returns:
        The worker's reply, or Flower's ``Error`` with the number alone where there is no worker or
        the link fails: the text stays in this site's log.
    """
    site = str(context.node_config.get(NODE_SITE, ""))
    link = _links.get(site)
    if link is None:
        log.error("site %s: no worker is connected", site)
        return _refused(message)
    try:
        return link.exchange(message)
    except Exception:
        log.exception("site %s: the link to the worker failed", site)
        return _refused(message)


def _refused(message: Message) -> Message:
    return Message(Error(code=UNREACHABLE, reason=f"FE-{UNREACHABLE}"), reply_to=message)
