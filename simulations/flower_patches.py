"""The two private places of Flower 1.41 and 1.42 that an in-process Grid needs; nothing else in fedge touches any.

Flower's runtime sets a process-wide task identity before an app may build messages, and its SuperLink numbers the
messages. A simulation has neither process, so it does both here. tests/simulations/test_flower_patches.py names the
versions for which this is tested.
"""

from __future__ import annotations

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity


def identify(run_id: int, node_id: int) -> None:
    """Set the identity from which new messages take their run and their source."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = 0


def number(message: Message, message_id: str) -> None:
    """Give a message the id by which its reply refers to it."""
    message.metadata.__dict__["_message_id"] = message_id
