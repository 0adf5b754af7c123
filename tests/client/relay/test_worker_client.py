"""The relay's end alone; the worker's is in test_service.py and test_serve.py."""

import subprocess
import sys
import threading
import time

import pytest
from flwr.app import ConfigRecord, RecordDict

from fedge.client.relay.worker_client import SocketLink, deadline_of_environment
from fedge.shared.daemon import sockets
from fedge.shared.errors import SiteError
from fedge.shared.wire import frames

EMPTY = RecordDict()


def code_of(call, *args):
    with pytest.raises(SiteError) as caught:
        call(*args)
    return caught.value.code


def playing(path, *acts):
    """A peer that does one act a connection."""
    listener = sockets.listen(path)

    def run():
        with listener:
            for act in acts:
                connection = listener.accept()[0]
                with connection:
                    act(connection)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def hang_up(connection):
    del connection


def listen_and_hang_up(connection):
    frames.receive(connection, 2**20, time.monotonic() + 60)


def answer(reply):
    def act(connection):
        frames.receive(connection, 2**20, time.monotonic() + 60)
        frames.send(connection, frames.encode_reply(reply), time.monotonic() + 60)

    return act


@pytest.mark.slow
def test_a_worker_that_is_away_or_dies_is_asked_again(tmp_path):
    path = tmp_path / "s"
    threading.Timer(
        0.4, lambda: playing(path, hang_up, listen_and_hang_up, answer(RecordDict()))
    ).start()
    assert SocketLink(path, 60.0).exchange("train", EMPTY) == RecordDict()


@pytest.mark.slow
@pytest.mark.parametrize("there", [False, True])
def test_a_worker_that_stays_away_is_a_numbered_error_at_the_deadline(tmp_path, there):
    if there:
        sockets.listen(tmp_path / "s").close()
    started = time.monotonic()
    assert code_of(SocketLink(tmp_path / "s", 0.7).exchange, "train", EMPTY) == 420
    assert 0.3 < time.monotonic() - started < 30


def test_a_worker_that_is_silent_is_one_too(tmp_path):
    over = threading.Event()
    playing(tmp_path / "s", lambda connection: over.wait(60))
    started = time.monotonic()
    assert code_of(SocketLink(tmp_path / "s", 0.3).exchange, "train", EMPTY) == 420
    assert time.monotonic() - started < 30
    over.set()


def test_status_is_asked_once(tmp_path):
    started = time.monotonic()
    assert code_of(SocketLink(tmp_path / "s", 60.0).status) == 420
    assert time.monotonic() - started < 30
    playing(tmp_path / "s", answer(RecordDict({"status": ConfigRecord({"pid": 1})})))
    assert SocketLink(tmp_path / "s", 60.0).status() == {"pid": 1}


@pytest.mark.parametrize(("sent", "code"), [(414, 414), (417, 417), (999, 413)])
def test_the_workers_number_is_passed_on(tmp_path, sent, code):
    playing(tmp_path / "s", answer(sent))
    assert code_of(SocketLink(tmp_path / "s", 60.0).exchange, "train", EMPTY) == code


def test_a_reply_that_is_none_is_not_believed(tmp_path):
    playing(tmp_path / "s", lambda c: c.sendall(b"\0\0\0\0\0\0\0\4junk"))
    assert code_of(SocketLink(tmp_path / "s", 60.0).exchange, "train", EMPTY) == 420
    playing(tmp_path / "t", lambda c: c.sendall(b"\xff" * 8))
    assert code_of(SocketLink(tmp_path / "t", 60.0).exchange, "train", EMPTY) == 420


def test_the_bundle_is_the_environments(tmp_path, monkeypatch):
    seen = []

    def look(connection):
        seen.append(frames.decode_request(frames.receive(connection, 2**20, time.monotonic() + 60)))
        frames.send(connection, frames.encode_reply(RecordDict()), time.monotonic() + 60)

    monkeypatch.setenv("FEDGE_BUNDLE", "ab" * 32)
    playing(tmp_path / "s", look, look)
    SocketLink(tmp_path / "s", 60.0).exchange("train", EMPTY)
    SocketLink(tmp_path / "s", 60.0).permit("cd" * 32)
    assert [request.bundle for request in seen] == ["ab" * 32, "cd" * 32]


@pytest.mark.parametrize(
    ("text", "found"), [(None, 3600), ("12.5", 12.5), ("nan", 3600), ("-1", 3600), ("x", 3600)]
)
def test_the_deadline_is_the_environments(monkeypatch, text, found):
    monkeypatch.delenv("FEDGE_WORKER_DEADLINE", raising=False)
    if text is not None:
        monkeypatch.setenv("FEDGE_WORKER_DEADLINE", text)
    assert deadline_of_environment() == found


@pytest.mark.slow
def test_the_relays_side_imports_neither_torch_nor_pydantic_nor_data():
    code = (
        "import sys, fedge.client.app, fedge.client.relay.message_relay, fedge.client.relay.worker_client;"
        "print([m for m in ('torch', 'pydantic', 'sklearn', 'scipy', 'safetensors', 'fedge.client.worker.handlers',"
        " 'fedge.client.data.dataset', 'fedge.client.settings.policy', 'fedge.shared.config.federation',"
        " 'fedge.shared.tasks.task') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_request_that_kills_the_worker_three_times_is_given_up(tmp_path):
    playing(tmp_path / "s", *[listen_and_hang_up] * 3, answer(EMPTY))
    started = time.monotonic()
    with pytest.raises(SiteError, match="died three times") as caught:
        SocketLink(tmp_path / "s", 60.0).exchange("train", EMPTY)
    assert caught.value.code == 413
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_two_deaths_are_forgiven_and_each_request_has_its_own(tmp_path):
    twice = [listen_and_hang_up, listen_and_hang_up, answer(EMPTY)]
    playing(tmp_path / "s", *twice, *twice)
    link = SocketLink(tmp_path / "s", 60.0)
    assert link.exchange("train", EMPTY) == EMPTY
    assert link.exchange("evaluate", EMPTY) == EMPTY


@pytest.mark.slow
def test_a_worker_that_did_not_read_the_request_did_not_die_of_it(tmp_path):
    playing(tmp_path / "s", *[hang_up] * 5, answer(EMPTY))
    large = RecordDict({"config": ConfigRecord({"x": "y" * 1_000_000})})
    assert SocketLink(tmp_path / "s", 60.0).exchange("train", large) == EMPTY
