import logging
import subprocess
import sys

import pytest
from flwr.app import Context, RecordDict

from fedge.client.app import app
from fedge.client.relay import message_relay
from fedge.client.relay.message_relay import DirectLink
from fedge.shared import protocol

REQUESTS = [protocol.REGISTER, protocol.TRAIN, protocol.EVALUATE, protocol.PROBE]


@pytest.fixture
def context():
    return Context(1, 1, {"site": "site-1"}, RecordDict(), {})


@pytest.fixture
def connected(worker):
    message_relay.connect("site-1", DirectLink(worker))
    yield worker
    message_relay.disconnect("site-1")


class BrokenLink:
    def exchange(self, kind, content):
        raise OSError("/secret/path is gone")


@pytest.mark.parametrize("kind", REQUESTS)
def test_flowers_client_app_reaches_the_worker(kind, connected, ask, weights, context):
    reply = app(ask(kind, None if kind.startswith("query") else weights), context)
    assert reply.has_content()
    assert reply.content[protocol.CONFIG][protocol.SITE] == "site-1"
    assert reply.metadata.reply_to_message_id == "m"


@pytest.mark.parametrize("kind", REQUESTS)
def test_no_link_is_a_numbered_error(kind, ask, weights, context):
    reply = app(ask(kind, weights), context)
    assert (reply.error.code, reply.error.reason) == (413, "FE-413")


def test_disconnected_site_is_gone(connected, ask, context):
    message_relay.disconnect("site-1")
    assert app(ask(protocol.REGISTER), context).has_error()


def test_only_the_named_site_answers(connected, ask):
    other = Context(1, 1, {"site": "site-2"}, RecordDict(), {})
    assert app(ask(protocol.REGISTER), other).error.code == 413
    unnamed = Context(1, 1, {}, RecordDict(), {})
    assert app(ask(protocol.REGISTER), unnamed).error.code == 413


def test_a_broken_link_tells_its_number_and_no_text(ask, context, caplog):
    message_relay.connect("site-1", BrokenLink())
    with caplog.at_level(logging.ERROR, "fedge.client.relay.message_relay"):
        reply = app(ask(protocol.REGISTER), context)
    message_relay.disconnect("site-1")
    assert (reply.error.code, reply.error.reason) == (413, "FE-413")
    assert "/secret/path" in caplog.text


def test_a_refusal_travels_as_its_number(connected, ask, weights, context):
    reply = app(ask(protocol.TRAIN, weights, task="digits"), context)
    assert (reply.error.code, reply.error.reason) == (414, "FE-414")


@pytest.mark.slow
def test_the_relay_imports_neither_torch_nor_data():
    code = (
        "import sys, fedge.client.app;"
        "print([m for m in ('torch', 'sklearn', 'fedge.client.worker.handlers', 'fedge.client.data.dataset',"
        " 'fedge.shared.tasks.task') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "[]"
