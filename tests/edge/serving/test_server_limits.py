from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from fedge.edge.serving.server import MAX_CONNECTIONS, MAX_THREADS

STATUS = grpc.StatusCode
HEALTH = "/grpc.health.v1.Health/Check"


def tensor(x: np.ndarray[Any, Any]) -> Any:
    found = triton.InferInput("input", list(x.shape), "FP32")
    found.set_data_from_numpy(x)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_queue_is_bounded_and_a_full_one_is_808(
    running: Callable[..., Any],
    image_bundle: Path,
    request_of: Callable[..., Any],
    images_of: Callable[..., Any],
) -> None:
    server = running(image_bundle, held=True, deadline=60.0, max_queue=2, max_batch=1)
    # On a busy machine all eight may begin before the first message is read.
    server.service.max_arriving = 8
    sent = request_of(images_of(1)).SerializeToString()
    refusals: list[tuple[Any, str]] = []

    def one(_: int) -> None:
        try:
            server.raw(sent)
        except grpc.RpcError as error:
            refusals.append((error.code(), error.details()))

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(one, i) for i in range(8)]
        # One runs, two wait.
        wait_for(lambda: len(refusals) == 5)
        server.gate.set()
        for future in futures:
            future.result(60)
    assert len(refusals) == 5
    assert {code for code, _ in refusals} == {STATUS.RESOURCE_EXHAUSTED}
    assert {text.split()[0] for _, text in refusals} == {"FE-808"}
    assert server.counts.snapshot().requests == {"OK": 8 - len(refusals), "FE-808": len(refusals)}


@pytest.mark.slow
def test_the_servers_deadline_is_809(
    running: Callable[..., Any],
    image_bundle: Path,
    request_of: Callable[..., Any],
    images_of: Callable[..., Any],
) -> None:
    server = running(image_bundle, held=True, deadline=2.0)
    sent = request_of(images_of(1)).SerializeToString()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.raw, sent)
        wait_for(lambda: server.runs == [1])
        status, text = server.refused(sent)
        assert status is STATUS.DEADLINE_EXCEEDED
        assert text.startswith("FE-809 ")
        server.gate.set()
        first.result(60)
    assert server.runs == [1]


def test_a_client_that_gave_up_is_not_run_for(
    running: Callable[..., Any],
    image_bundle: Path,
    request_of: Callable[..., Any],
    images_of: Callable[..., Any],
) -> None:
    """Its own deadline, its cancellation, and the protocol's parameter ``timeout``."""
    server = running(image_bundle, held=True, deadline=60.0)
    sent = request_of(images_of(1)).SerializeToString()
    hurried = request_of(images_of(1))
    hurried.parameters["timeout"].int64_param = 50_000
    with ThreadPoolExecutor(2) as pool, server.channel() as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        first = pool.submit(server.raw, sent)
        wait_for(lambda: server.runs == [1])
        cancelled = call.future(sent)
        wait_for(lambda: server.service.served.waiting == 1)
        cancelled.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            call(sent, timeout=0.05)
        assert caught.value.code() is STATUS.DEADLINE_EXCEEDED
        assert server.refused(hurried.SerializeToString())[1].startswith("FE-809 ")
        # The server may need a moment to see which clients have disconnected.
        wait_for(lambda: not any(item.alive() for item in server.service.served._batcher._queue))
        server.gate.set()
        first.result(60)
        server.raw(sent)
    wait_for(lambda: server.service.served.waiting == 0)
    assert server.runs == [1, 1]


@pytest.mark.slow
def test_batches_give_the_numbers_of_single_requests(
    running: Callable[..., Any],
    image_bundle: Path,
    request_of: Callable[..., Any],
    images_of: Callable[..., Any],
) -> None:
    alone, busy = running(image_bundle), running(image_bundle, held=True)
    sent = [request_of(images_of(1 + i % 3, seed=i)).SerializeToString() for i in range(60)]
    expected = [alone.raw(data) for data in sent]
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(busy.raw, sent)
        wait_for(lambda: busy.service.served.waiting >= 10)
        busy.gate.set()
        found = list(answers)
    for a, b in zip(expected, found, strict=True):
        a, b = (service_pb2.ModelInferResponse.FromString(x) for x in (a, b))
        assert a.outputs == b.outputs
        for x, y in zip(a.raw_output_contents[:2], b.raw_output_contents[:2], strict=True):
            np.testing.assert_allclose(
                np.frombuffer(x, np.float32), np.frombuffer(y, np.float32), rtol=1e-5, atol=1e-6
            )
    assert max(busy.runs) > 3
    assert sum(busy.runs) == sum(alone.runs)


@pytest.mark.slow
def test_a_call_without_its_message_is_ended(
    running: Callable[..., Any], image_bundle: Path
) -> None:
    server = running(image_bundle, deadline=2.0)
    hold = threading.Event()

    def nothing() -> Any:
        hold.wait(60)
        yield from ()

    with server.channel() as channel:
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer").future(nothing())
        wait_for(lambda: len(server.service._arriving) == 1)
        assert server.service.end_stalled() == 0
        wait_for(lambda: server.service.end_stalled() == 1)
        with pytest.raises(grpc.RpcError) as caught:
            call.result(60)
        assert caught.value.code() is STATUS.CANCELLED
        wait_for(lambda: not server.service._arriving)
        hold.set()
        ended = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            ended(iter(()), timeout=60)
        assert caught.value.details().startswith("FE-810 request: must be one message")


@pytest.mark.slow
def test_calls_without_messages_leave_room_for_others(
    running: Callable[..., Any],
    image_bundle: Path,
    request_of: Callable[..., Any],
    images_of: Callable[..., Any],
) -> None:
    """150 of them at 104 threads; the oldest are ended, the others wait for at most two seconds."""
    server = running(image_bundle, deadline=600.0)
    sent = request_of(images_of(1)).SerializeToString()
    most = server.service.max_arriving
    assert most == 52
    hold = threading.Event()

    def nothing() -> Any:
        hold.wait(240)
        yield from ()

    with server.channel() as channel:
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        calls = [call.future(nothing()) for _ in range(150)]
        wait_for(lambda: sum(one.done() for one in calls) == 150 - most)
        assert len(server.service._arriving) == most
        start = time.monotonic()
        for _ in range(20):
            server.raw(sent, timeout=60)
            server.raw(b"", "/inference.GRPCInferenceService/ServerLive", timeout=60)
        assert time.monotonic() - start < 120
        # Each of the two takes a place while its own message arrives.
        assert len(server.service._arriving) >= most - 2
        wait_for(lambda: not server.service.end_stalled() and all(one.done() for one in calls))
        assert time.monotonic() - start < 180  # and not the 600 that a request has
        assert {one.code() for one in calls} == {STATUS.CANCELLED}
        hold.set()
    assert not server.service._arriving
    # gRPC shows the end of a call as a cancellation or as the end of its messages.
    counted = server.counts.snapshot().requests
    assert counted.pop("OK") == 20
    assert set(counted) <= {"CANCELLED", "FE-810"}
    assert sum(counted.values()) == 150


def test_limits_that_ask_for_more_threads_than_there_may_be_are_lowered_aloud(
    running: Callable[..., Any], image_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = running(image_bundle, max_queue=4096, max_batch=4096, parallel=256)
    assert server.server._pool._max_workers == MAX_THREADS == 1024
    assert "at most 1016 requests wait or run at once, not the 1052672 of" in caplog.text
    caplog.clear()
    assert running(image_bundle, max_queue=1000, max_batch=16).server._pool._max_workers == 1024
    assert not caplog.text


def test_compressed_messages_are_refused_before_they_are_unpacked(
    image_server: Any, request_of: Callable[..., Any], images_of: Callable[..., Any]
) -> None:
    bomb = b"\0" * (image_server.service.served.max_bytes - 10)
    with pytest.raises(grpc.RpcError) as caught:
        image_server.raw(bomb, compression=grpc.Compression.Gzip)
    assert caught.value.code() is STATUS.UNIMPLEMENTED
    image_server.raw(request_of(images_of(1)).SerializeToString())


CLIENT = """
import sys, grpc
call = grpc.insecure_channel(sys.argv[1]).unary_unary("/inference.GRPCInferenceService/ModelInfer")
data = sys.stdin.buffer.read()
calls = [call.future(data) for _ in range(10)]
print("sent", flush=True)
calls[-1].result()
"""


def test_clients_killed_in_the_middle_cost_nothing(
    running: Callable[..., Any],
    image_bundle: Path,
    request_of: Callable[..., Any],
    images_of: Callable[..., Any],
) -> None:
    server = running(image_bundle, held=True, deadline=60.0, max_batch=2)
    sent = request_of(images_of(1)).SerializeToString()
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(sent)
    process.stdin.close()
    assert process.stdout.readline() == b"sent\n"
    wait_for(lambda: server.service.served.waiting >= 5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    # The kernel has closed its connection; the server may need a moment to see it.
    wait_for(lambda: not any(item.alive() for item in server.service.served._batcher._queue))
    server.gate.set()
    server.raw(sent)
    wait_for(lambda: server.service.served.waiting == 0)
    # The one that ran first, and ours.
    assert server.runs == [1, 1]


@pytest.mark.slow
def test_two_thousand_broken_requests_do_not_disturb_the_good_ones(
    image_server: Any, request_of: Callable[..., Any], images_of: Callable[..., Any]
) -> None:
    random = np.random.default_rng(0)
    x = images_of(2)
    good = request_of(x, id="x").SerializeToString()
    expected = image_server.raw(good)
    codes: set[str] = set()
    with image_server.channel() as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for i in range(2000):
            data = bytearray(good)
            if i % 4 == 0:
                data = bytearray(random.bytes(int(random.integers(0, 200))))
            for _ in range(int(random.integers(1, 4))):
                if data:
                    data[int(random.integers(len(data)))] = int(random.integers(256))
            try:
                call(bytes(data), timeout=60)
                codes.add("OK")
            except grpc.RpcError as error:
                assert error.code() in (
                    STATUS.INVALID_ARGUMENT,
                    STATUS.NOT_FOUND,
                    STATUS.OUT_OF_RANGE,
                ), error
                codes.add(error.details().split()[0])
            if i % 100 == 0:
                assert call(good, timeout=60) == expected
    assert codes >= {"OK", "FE-802", "FE-803", "FE-804", "FE-810"}


def test_bytes_that_are_no_http2_do_no_harm(image_server: Any) -> None:
    host, port = image_server.address.rsplit(":", 1)
    for _ in range(20):
        with socket.create_connection((host, int(port)), timeout=60) as one:
            one.sendall(os.urandom(500))
    assert image_server.raw(b"", HEALTH) == b"\x08\x01"


def test_connections_are_bounded_and_free_places_are_taken_again(image_server: Any) -> None:
    host, port = image_server.address.rsplit(":", 1)
    held = [
        socket.create_connection((host, int(port)), timeout=60) for _ in range(MAX_CONNECTIONS + 5)
    ]
    try:
        with pytest.raises(grpc.RpcError) as caught, image_server.channel() as channel:
            channel.unary_unary(HEALTH)(b"", timeout=1)
        assert caught.value.code() in (STATUS.UNAVAILABLE, STATUS.DEADLINE_EXCEEDED)
    finally:
        for one in held:
            one.close()
    with image_server.channel() as channel:
        call = channel.unary_unary(HEALTH)
        assert call(b"", timeout=60, wait_for_ready=True) == b"\x08\x01"


@pytest.mark.slow
def test_the_end_waits_for_no_run_that_hangs(
    running: Callable[..., Any],
    image_bundle: Path,
    request_of: Callable[..., Any],
    images_of: Callable[..., Any],
) -> None:
    server = running(image_bundle, held=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.refused, request_of(images_of(1)).SerializeToString())
        wait_for(lambda: server.runs == [1])
        assert not server.server.stop(0.1)
        assert waiting.result(60)[0] in (STATUS.CANCELLED, STATUS.UNAVAILABLE)
        server.gate.set()
    wait_for(lambda: server.service.served.idle)
