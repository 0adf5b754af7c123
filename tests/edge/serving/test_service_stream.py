"""ModelStreamInfer: answers in the order of requests, a refusal ends nothing, a silent stream holds up nobody."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


class Stream:
    """The published client with one stream open; what comes back is in ``answers``."""

    def __init__(self, address: str) -> None:
        self.client = triton.InferenceServerClient(address)
        self.answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))

    def send(self, x: np.ndarray[Any, Any], name: str = "image", id: str = "") -> None:
        tensor = triton.InferInput("input", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        self.client.async_stream_infer(name, [tensor], request_id=id)

    def answer(self) -> tuple[Any, Any]:
        return self.answers.get(timeout=60)


@pytest.fixture
def stream_of() -> Iterator[Callable[[Any], Stream]]:
    opened: list[Stream] = []

    def start(server: Any) -> Stream:
        opened.append(Stream(server.address))
        return opened[-1]

    yield start
    for one in opened:
        one.client.close()


def test_the_published_client_streams_and_gets_what_single_requests_give(
    running: Callable[..., Any],
    image_bundle: Path,
    images_of: Callable[..., Any],
    request_of: Callable[..., Any],
    stream_of: Callable[[Any], Stream],
) -> None:
    server = running(image_bundle)
    stream = stream_of(server)
    sent = [images_of(n, seed=n) for n in (1, 3, 2, 1)]
    for i, x in enumerate(sent):
        stream.send(x, id=f"r-{i}")
    for i, x in enumerate(sent):
        result, error = stream.answer()
        assert error is None
        assert result.get_response().id == f"r-{i}"
        single = service_pb2.ModelInferResponse.FromString(
            server.raw(request_of(x).SerializeToString())
        )
        assert result.as_numpy("logits").tobytes() == single.raw_output_contents[0]
    assert server.counts.snapshot().requests == {"OK": 8}


def test_a_refused_request_is_an_answer_and_the_stream_goes_on(
    running: Callable[..., Any],
    image_bundle: Path,
    images_of: Callable[..., Any],
    stream_of: Callable[[Any], Stream],
) -> None:
    server = running(image_bundle)
    stream = stream_of(server)
    stream.send(np.full((1, 2, 3), np.nan, np.float32))
    stream.send(images_of(1), name="another")
    stream.send(images_of(1))
    texts = [str(stream.answer()[1]) for _ in range(2)]
    assert ["FE-804" in texts[0], "FE-810" in texts[1]] == [True, True]
    result, error = stream.answer()
    assert error is None
    assert result.as_numpy("logits").shape == (1, 3)
    # Cut, repeated and foreign bytes too.
    with server.channel() as channel:
        call = channel.stream_stream(STREAM)(iter([b"\xff\xff", b"", b"\x0a\x05image"]))
        kinds = [service_pb2.ModelStreamInferResponse.FromString(a).error_message for a in call]
    assert [text[:6] for text in kinds] == ["FE-810", "FE-810", "FE-810"]


def test_four_streams_of_one_connection_run_side_by_side(
    running: Callable[..., Any], image_bundle: Path, request_of: Callable[..., Any], images_of: Any
) -> None:
    server = running(image_bundle, held=True, deadline=60.0, parallel=2, max_batch=1)
    sent = request_of(images_of(1)).SerializeToString()
    with server.channel() as channel:
        calls = [channel.stream_stream(STREAM)(iter([sent, sent])) for _ in range(4)]
        end = time.monotonic() + 60
        while len(server.runs) < 2:
            assert time.monotonic() < end
            time.sleep(0.005)
        server.gate.set()
        assert [len(list(call)) for call in calls] == [2] * 4
    assert server.counts.snapshot().requests == {"OK": 8}


def test_silent_streams_hold_up_neither_requests_nor_the_end(
    running: Callable[..., Any], image_bundle: Path, request_of: Callable[..., Any], images_of: Any
) -> None:
    """More of them than there are threads; one that has been answered may be silent for long."""
    server = running(image_bundle, max_queue=2)
    sent = request_of(images_of(1)).SerializeToString()
    quiet = threading.Event()

    def requests() -> Iterator[bytes]:
        yield sent
        quiet.wait(60)

    with server.channel() as channel:
        answered = channel.stream_stream(STREAM)(requests())
        assert next(answered)
        assert server.service.end_stalled() == 0
        calls = [channel.stream_stream(STREAM)(requests()) for _ in range(30)]
        for _ in range(5):
            server.raw(sent)
        start = time.monotonic()
        assert server.server.stop(30.0)
        assert time.monotonic() - start < 20
        quiet.set()
        for call in (answered, *calls):
            with pytest.raises(grpc.RpcError):
                while True:
                    next(call)
