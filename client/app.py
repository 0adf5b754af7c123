"""Flower's ClientApp, a relay only. The work is done by ``fedge.client.worker.handlers``."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedge.client.relay import message_relay

app = ClientApp()


@app.query("register")
def register(message: Message, context: Context) -> Message:
    """Ask the site for its numbers of examples, and for sums over its features where the task standardises."""
    return message_relay.forward(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Ask the site to train."""
    return message_relay.forward(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Ask the site to evaluate."""
    return message_relay.forward(message, context)


@app.evaluate("calibrate")
def calibrate(message: Message, context: Context) -> Message:
    """Ask the site for the ranges of the final model's activations."""
    return message_relay.forward(message, context)


@app.evaluate("qualify")
def qualify(message: Message, context: Context) -> Message:
    """Ask the site for the metrics of the final model in reduced precisions."""
    return message_relay.forward(message, context)


@app.query("probe")
def probe(message: Message, context: Context) -> Message:
    """Ask the site whether it is connected, and whether it is computing."""
    return message_relay.forward(message, context)


@app.query("secagg_statistics")
def secagg_statistics(message: Message, context: Context) -> Message:
    """Ask the site to take part in a secure sum over its features."""
    return message_relay.forward(message, context)


@app.query("secagg_share")
def secagg_share(message: Message, context: Context) -> Message:
    """Ask the site to share the secrets of its masks among the other sites."""
    return message_relay.forward(message, context)


@app.query("secagg_masked")
def secagg_masked(message: Message, context: Context) -> Message:
    """Ask the site for its masked vector."""
    return message_relay.forward(message, context)


@app.query("secagg_commit")
def secagg_commit(message: Message, context: Context) -> Message:
    """Ask the site to sign the list of survivors."""
    return message_relay.forward(message, context)


@app.query("secagg_unmask")
def secagg_unmask(message: Message, context: Context) -> Message:
    """Ask the site for the shares that unmask the sum."""
    return message_relay.forward(message, context)
