"""The two private places of Flower: seen to work with these versions, and to be looked at again with others."""

from __future__ import annotations

import flwr
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.simulations import flower_patches

#: Minor versions of Flower with which the tests below were seen to pass.
SEEN = ("1.41", "1.42")


def ask(node: int = 4) -> Message:
    content = RecordDict({"config": ConfigRecord({"a": 1})})
    return Message(content, dst_node_id=node, message_type="train")


def test_the_installed_flower_is_one_that_was_looked_at():
    minor = ".".join(flwr.__version__.split(".")[:2])
    assert minor in SEEN, (
        f"Flower {flwr.__version__} is installed; fedge.simulations.flower_patches was seen to work with"
        f" {', '.join(SEEN)} only. Run this file's other tests; if they pass, read TaskIdentity and"
        " Message.metadata in the new version and add it to SEEN."
    )


def test_identity_is_what_new_messages_carry():
    flower_patches.identify(77, 0)
    assert ask().metadata.run_id == 77
    assert ask().metadata.src_node_id == 0
    flower_patches.identify(78, 5)
    assert ask().metadata.run_id == 78
    assert ask().metadata.src_node_id == 5


def test_without_an_identity_flower_refuses(monkeypatch: pytest.MonkeyPatch):
    """The reason for the first place: were this to pass, ``identify`` could go."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="TaskIdentity"):
        ask()
    flower_patches.identify(1, 0)
    assert ask().metadata.run_id == 1


def test_a_reply_refers_to_the_number():
    flower_patches.identify(1, 0)
    request = ask(4)
    assert request.metadata.message_id == ""
    flower_patches.number(request, "m-9")
    assert request.metadata.message_id == "m-9"
    reply = Message(RecordDict(), reply_to=request)
    assert reply.metadata.reply_to_message_id == "m-9"
    assert reply.metadata.src_node_id == 4
    assert reply.metadata.dst_node_id == 0
