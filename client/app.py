"""Flower's ClientApp: a relay, nothing more. The work is done by ``fedge.client.worker``."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedge.client import relay

app = ClientApp()


@app.query("register")
def register(message: Message, context: Context) -> Message:
    """Ask the site for its sizes, and for sums over its features where the task standardises."""
    return relay.forward(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Ask the site to train."""
    return relay.forward(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Ask the site to evaluate."""
    return relay.forward(message, context)


@app.query("probe")
def probe(message: Message, context: Context) -> Message:
    """Ask the site whether it is there, and whether it is at work."""
    return relay.forward(message, context)
