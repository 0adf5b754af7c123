"""The worker's service over real sockets, in this process; processes are in test_serve.py."""

import os
import socket
import struct
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from fedge.client.relay import message_relay
from fedge.client.relay.worker_client import DEATHS, SocketLink
from fedge.client.settings import policy_writer
from fedge.client.settings.policy import PolicyFile
from fedge.client.worker import socket_server as services
from fedge.client.worker.handlers import SiteWorker
from fedge.client.worker.socket_server import Service
from fedge.shared import protocol
from fedge.shared.daemon import sockets
from fedge.shared.errors import SiteError
from fedge.shared.secagg import messages, transcript
from fedge.shared.wire import frames
from fedge.simulations import consortium

BUNDLE, OTHER = "ab" * 32, "cd" * 32
GOOD = {"tasks": ["blobs"], "bundles": [BUNDLE], "versions": ["0.1.0"], "device": "cpu"}
KNOWN = {"fedge_version": "0.1.0", "cohort": 3}
TRAIN, EVALUATE, REGISTER, PROBE = (
    protocol.TRAIN,
    protocol.EVALUATE,
    protocol.REGISTER,
    protocol.PROBE,
)


class Gate:
    """A loss that waits where the test wants it to, and counts."""

    def __init__(self, loss):
        self.loss, self.open, self.entered, self.calls = (
            loss,
            threading.Event(),
            threading.Event(),
            0,
        )
        self.open.set()
        self.raises = None

    def __call__(self, logits, labels):
        self.calls += 1
        self.entered.set()
        assert self.open.wait(60)
        if self.raises is not None:
            raise self.raises
        return self.loss(logits, labels)


class Served:
    def __init__(self, home, worker, gate, wait=30.0):
        self.home, self.worker, self.gate = home, worker, gate
        self.path = home / "worker.sock"
        self.statuses = []
        self.service = Service(worker, PolicyFile(home), wait, self.statuses.append)
        self.listener = sockets.listen(self.path)
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self):
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            self.service.take(connection)

    def close(self):
        self.gate.open.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(60)
        self.service.drain(5)

    def link(self, deadline=20.0, bundle=BUNDLE):
        return SocketLink(self.path, deadline, bundle)

    def ask(self, message, **more):
        return self.link(**more).exchange(message.metadata.message_type, message.content)


@pytest.fixture
def served(task, data, tmp_path):
    home = tmp_path.joinpath(*["a-folder-with-a-long-name"] * 6)
    gate = Gate(task.loss)
    policy_writer.write(home, **GOOD)
    found = Served(home, SiteWorker("site-1", replace(task, loss=gate), data, home), gate)
    yield found
    found.close()


@pytest.fixture
def request_of(ask):
    return lambda kind, arrays=None, **more: ask(kind, arrays, **KNOWN | more)


def wait_for(what):
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def code_of(call, *args, **more):
    with pytest.raises(SiteError) as caught:
        call(*args, **more)
    return caught.value.code


def data_of(reply):
    return b"".join(frames.encode_reply(reply))


def test_a_reply_over_the_socket_equals_the_direct_one(served, request_of, weights, worker, tell):
    for kind in (REGISTER, TRAIN, EVALUATE):
        asked = request_of(kind, None if kind == REGISTER else weights)
        assert data_of(served.ask(asked)) == data_of(tell(worker, asked))


def test_the_relay_finds_the_worker_by_its_environment(served, request_of, weights, monkeypatch):
    context = Context(1, 1, {"site": "site-1"}, RecordDict(), {})
    monkeypatch.setenv("FEDGE_WORKER_SOCKET", str(served.path))
    monkeypatch.setenv("FEDGE_WORKER_DEADLINE", "20")
    monkeypatch.setenv("FEDGE_BUNDLE", BUNDLE)
    reply = message_relay.forward(request_of(TRAIN, weights), context)
    assert reply.content[protocol.CONFIG][protocol.SITE] == "site-1"
    monkeypatch.setenv("FEDGE_BUNDLE", OTHER)
    reply = message_relay.forward(request_of(TRAIN, weights), context)
    assert (reply.error.code, reply.error.reason) == (419, "FE-419")
    monkeypatch.delenv("FEDGE_WORKER_SOCKET")
    assert message_relay.forward(request_of(TRAIN, weights), context).error.code == 413


def test_a_repeated_request_is_answered_from_the_last_reply(served, request_of, weights):
    first = served.ask(request_of(TRAIN, weights))
    calls = served.gate.calls
    assert data_of(served.ask(request_of(TRAIN, weights))) == data_of(first)
    assert served.gate.calls == calls
    served.ask(request_of(EVALUATE, weights))
    assert data_of(served.ask(request_of(TRAIN, weights))) == data_of(first)
    assert served.gate.calls == calls
    served.ask(request_of(TRAIN, weights, seed=43))
    assert served.gate.calls == 2 * calls


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE, messages.STATISTICS])
def test_a_masked_sum_is_begun_once_though_its_request_comes_twice(
    task, data, tmp_path, request_of, weights, kind
):
    """Each beginning has keys of its own, and a number that a site takes once."""
    policy_writer.write(tmp_path, **GOOD)
    anchors = consortium.anchors(["site-1"], 3)["site-1"]
    found = Served(tmp_path, SiteWorker("site-1", task, data, tmp_path, anchors=anchors), Gate(0))
    bounds = {"clipping-bound": 1.0, "value-bound": 1.0, "state-bound": 1.0, "weight-cap": 9}
    asked = request_of(kind, None if kind == messages.STATISTICS else weights)
    if kind == messages.STATISTICS:
        asked.content[protocol.CONFIG][protocol.SERVER_ROUND] = 0
    asked.content[messages.SECURE] = messages.record(
        {messages.PROTOCOL: transcript.VERSION, "attempt": 1, **bounds}
    )
    try:
        first = data_of(found.ask(asked))
        assert data_of(found.ask(asked)) == first
        asked.content[messages.SECURE]["attempt"] = 2
        assert data_of(found.ask(asked)) != first
    finally:
        found.close()


def test_what_was_asked_while_it_ran_is_trained_once(served, request_of, weights):
    served.gate.open.clear()
    replies = []

    def ask():
        replies.append(data_of(served.ask(request_of(TRAIN, weights))))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert served.gate.entered.wait(60)
    wait_for(lambda: len(served.service._open) == 3)
    served.gate.open.set()
    for thread in threads:
        thread.join(60)
    assert len(replies) == 3
    assert len(set(replies)) == 1
    assert served.gate.calls == 5  # one epoch of 37 rows in batches of 8


def test_a_failure_is_not_kept(served, request_of, weights):
    served.gate.raises = ValueError("once")
    assert code_of(served.ask, request_of(TRAIN, weights)) == 413
    served.gate.raises = None
    assert protocol.ARRAYS in served.ask(request_of(TRAIN, weights))


def test_others_are_answered_at_once_while_it_trains(served, request_of, weights):
    def busy():
        return served.ask(request_of(PROBE))[protocol.METRICS]["busy"]

    assert busy() == 0
    served.gate.open.clear()
    thread = threading.Thread(target=served.ask, args=(request_of(TRAIN, weights),))
    thread.start()
    assert served.gate.entered.wait(60)
    # The training does not end before the gate opens.
    assert busy() == 1
    served.link().permit(BUNDLE)
    status = served.link().status()
    assert status["busy"] is True
    assert (status["last-kind"], status["last-run"], status["last-round"]) == (TRAIN, "r-1", 1)
    served.gate.open.set()
    thread.join(60)
    assert busy() == 0


def test_status_says_who_and_what(served):
    found = served.link(bundle="").status()
    assert found["pid"] == os.getpid()
    assert (found["site"], found["task"], found["device"]) == ("site-1", "blobs", "cpu")
    assert found["busy"] is False
    # Whoever has taken over the relay may ask for it.
    assert set(found) == {"pid", "site", "task", "device", "busy", "uptime"}
    assert found["uptime"] >= 0
    assert "last-kind" not in found


# Policy


def test_a_bundle_that_is_not_approved_gets_nothing(served, request_of, weights):
    assert code_of(served.link().permit, OTHER) == 419
    for kind in (REGISTER, TRAIN, EVALUATE, PROBE):
        for bundle in (OTHER, ""):
            assert code_of(served.ask, request_of(kind, weights), bundle=bundle) == 419
    assert served.gate.calls == 0


def test_a_change_of_the_policy_holds_at_the_next_request(served, request_of, weights, caplog):
    served.ask(request_of(TRAIN, weights))
    policy_writer.write(served.home, **GOOD, min_cohort=4)
    assert code_of(served.ask, request_of(TRAIN, weights)) == 418
    assert "cohort: must be at least 4" in caplog.text
    path = served.home / "policy.toml"
    good = path.read_text()
    path.write_text("tasks = [")
    for kind in (REGISTER, TRAIN, EVALUATE, PROBE):
        assert code_of(served.ask, request_of(kind)) == 418
    assert code_of(served.link().permit, BUNDLE) == 418
    assert served.link().status()["site"] == "site-1"
    path.write_text(good.replace("min-cohort = 4", "min-cohort = 3"))
    served.ask(request_of(TRAIN, weights))


def test_a_request_beyond_the_policy_s_size_is_refused_unread(served, request_of):
    path = served.home / "policy.toml"
    path.write_text(path.read_text().replace("max-request-mib = 1024", "max-request-mib = 1"))
    large = request_of(TRAIN, {"w": np.zeros(5_000_000, np.float32)})
    assert code_of(served.ask, large) == 418


def test_another_device_in_the_policy_asks_for_a_new_process(served, request_of, weights):
    path = served.home / "policy.toml"
    path.write_text(path.read_text().replace('device = "cpu"', 'device = "auto"'))
    # Here it is always the same process that is asked, and closes the connection.
    assert code_of(served.ask, request_of(TRAIN, weights)) == 413
    assert served.statuses == [75] * DEATHS
    assert served.gate.calls == 0


def test_a_device_that_is_gone_is_answered_and_asks_for_a_new_process(served, request_of, weights):
    served.gate.raises = torch.AcceleratorError("CUDA error: device-side assert triggered")
    assert code_of(served.ask, request_of(TRAIN, weights)) == 417
    served.service.drain(5)
    assert served.statuses == [75]


def test_memory_that_ran_out_leaves_the_service_as_it_was(served, request_of, weights):
    served.gate.raises = torch.OutOfMemoryError("CUDA out of memory")
    assert code_of(served.ask, request_of(TRAIN, weights)) == 416
    served.gate.raises = None
    assert protocol.ARRAYS in served.ask(request_of(TRAIN, weights))
    assert served.statuses == []


# Hostile and broken connections


def raw(served, data):
    with sockets.connect(served.path, 5.0) as connection:
        connection.sendall(data)
        return frames.decode_reply(frames.receive(connection, 2**20, time.monotonic() + 60))


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (struct.pack(">Q", 4) + b"\xff" * 4, 414),
        (struct.pack(">Q", 6) + struct.pack(">I", 2) + b"{}", 414),
        (struct.pack(">Q", 2**63), 418),
        (b"GET / HTTP/1.1\r\n\r\n", 418),
    ],
)
def test_hostile_frames_are_refused_and_the_service_goes_on(served, request_of, sent, code):
    assert raw(served, sent) == code
    assert protocol.METRICS in served.ask(request_of(REGISTER))


def test_unknown_kinds_are_refused(served, request_of):
    message = request_of(REGISTER)
    for kind in ("query.secrets", "worker.other", "system"):
        assert code_of(served.link().exchange, kind, message.content) == 414


def test_half_a_request_is_forgotten(served, request_of):
    with sockets.connect(served.path, 5.0) as connection:
        connection.sendall(struct.pack(">Q", 100) + b"half")
    assert protocol.METRICS in served.ask(request_of(REGISTER))


@pytest.mark.slow
def test_connections_are_bounded_and_a_relay_waits_for_its_place(served, request_of):
    idle = [sockets.connect(served.path, 5.0) for _ in range(services.MAX_CONNECTIONS)]
    started = time.monotonic()
    threading.Timer(0.6, lambda: [connection.close() for connection in idle]).start()
    assert protocol.METRICS in served.ask(request_of(REGISTER))
    assert time.monotonic() - started > 0.3


@pytest.mark.slow
def test_a_request_whose_relay_has_gone_leaves_the_queue(served, request_of, weights):
    served.gate.open.clear()
    thread = threading.Thread(target=served.ask, args=(request_of(TRAIN, weights),))
    thread.start()
    assert served.gate.entered.wait(60)
    message = request_of(TRAIN, weights, seed=44)
    parts = frames.encode_request(frames.Request(TRAIN, message.content, BUNDLE))
    with sockets.connect(served.path, 5.0) as connection:
        frames.send(connection, parts, time.monotonic() + 60)
        wait_for(lambda: len(served.service._open) == 2)
    wait_for(lambda: len(served.service._open) == 1)
    served.gate.open.set()
    thread.join(60)
    served.service.drain(10)
    assert served.gate.calls == 5


# A computation that hangs


@pytest.mark.slow
def test_a_computation_that_hangs_asks_for_a_new_process(
    task, data, tmp_path, request_of, weights, caplog
):
    gate = Gate(task.loss)
    policy_writer.write(tmp_path, **GOOD)
    worker = SiteWorker("site-1", replace(task, loss=gate), data, tmp_path)
    found = Served(tmp_path, worker, gate, wait=2.0)
    try:
        # The twin: one that ends in time costs nothing, however often.
        for _ in range(2):
            found.ask(request_of(TRAIN, weights))
        wait_for(lambda: not any(isinstance(t, threading.Timer) for t in threading.enumerate()))
        assert found.statuses == []
        gate.open.clear()
        assert code_of(found.ask, request_of(TRAIN, weights, seed=43), deadline=2.5) == 420
        wait_for(lambda: found.statuses)
        assert found.statuses == [75]
        assert "FE-413 train: must be computed within 2 s" in caplog.text
    finally:
        found.close()
