from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from fedge.edge.runtime import reference_trial
from fedge.edge.serving.reload import Background, Reloader, look
from fedge.shared.preprocessing.schema import OutputSchema


@pytest.fixture
def reloader_of() -> Callable[[Any], Reloader]:
    def make(server: Any) -> Reloader:
        return Reloader(
            server.bundle, look(server.bundle), server.load, server.service, server.counts
        )

    return make


def logits(server: Any, sent: bytes) -> bytes:
    return bytes(service_pb2.ModelInferResponse.FromString(server.raw(sent)).raw_output_contents[0])


def test_a_new_bundle_takes_over_under_load_and_no_request_fails(
    running: Callable[..., Any],
    bundle_of: Callable[..., Path],
    graph_of: Callable[..., bytes],
    request_of: Callable[..., Any],
    reloader_of: Callable[[Any], Reloader],
) -> None:
    def version(i: int) -> Path:
        return bundle_of(
            graph_of((1, 2, 3), np.full((6, 3), float(i))), model_sha256=f"{i:064x}", run=f"r-{i}"
        )

    server = running(version(1), seconds=0.002)
    reloader = reloader_of(server)
    sent = request_of(np.ones((1, 2, 3), np.float32)).SerializeToString()
    done = threading.Event()
    seen: list[set[float]] = []
    failures: list[Exception] = []

    def client() -> None:
        mine = set()
        with server.channel() as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            while not done.is_set():
                try:
                    answer = service_pb2.ModelInferResponse.FromString(call(sent, timeout=60))
                    value = np.frombuffer(answer.raw_output_contents[0], np.float32)[0]
                    # Version and numbers are always of the same model.
                    assert answer.model_version == f"{round(float(value) / 3):064x}"[:12]
                    mine.add(float(value))
                except Exception as error:
                    failures.append(error)
        seen.append(mine)

    clients = [threading.Thread(target=client) for _ in range(6)]
    for thread in clients:
        thread.start()
    old = []
    for i in range(2, 8):
        old.append(server.service.served)
        version(i)
        assert not reloader.poll()  # it has changed, and might still be changing
        assert reloader.poll()
        assert not reloader.poll()
    done.set()
    for thread in clients:
        thread.join(60)
    assert not failures
    assert set().union(*seen) <= {3.0 * i for i in range(1, 8)}
    assert np.frombuffer(logits(server, sent), np.float32)[0] == 21.0
    assert server.counts.snapshot().reloads == {"swapped": 6}
    # The old ones have been freed, the new one has not.
    assert [served.enter() for served in old] == [False] * 6
    for served in old:
        with pytest.raises(Exception, match="closed"):
            served.model.logits(np.zeros((1, 1, 2, 3), np.float32))


@pytest.mark.parametrize("allowed", [False, True])
def test_an_older_bundle_takes_over_only_where_that_is_allowed(
    running: Callable[..., Any],
    bundle_of: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    allowed: bool,
) -> None:
    server = running(bundle_of(serial=8, run="newer"))
    parts = (server.bundle, look(server.bundle), server.load, server.service, server.counts)
    reloader = Reloader(*parts, allow_older=allowed)
    bundle_of(serial=7, run="older")
    assert [reloader.poll() for _ in range(2)] == [False, allowed]
    assert server.service.served.model.manifest.run == ("older" if allowed else "newer")
    refused = "FE-713 serial: must be 8 or more, got 7. Remedy: Give a newer bundle, or start"
    assert (refused in caplog.text) != allowed
    # The same serial is none that was replaced.
    bundle_of(serial=8, run="again")
    assert [reloader.poll() for _ in range(2)] == [False, True]


def test_a_model_in_use_is_freed_by_its_last_user(
    running: Callable[..., Any], image_bundle: Path
) -> None:
    served = running(image_bundle).load()
    ready = np.zeros((1, 1, 2, 3), np.float32)
    assert served.enter()
    assert served.enter()
    served.retire()
    served.leave()
    served.model.logits(ready)
    assert not served.enter()
    served.leave()
    with pytest.raises(Exception, match="closed"):
        served.model.logits(ready)


def test_a_broken_bundle_is_refused_and_the_old_one_goes_on(
    running: Callable[..., Any],
    bundle_of: Callable[..., Path],
    request_of: Callable[..., Any],
    reloader_of: Callable[[Any], Reloader],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = bundle_of()
    server = running(bundle)
    reloader = reloader_of(server)
    sent = request_of(np.ones((1, 2, 3), np.float32)).SerializeToString()
    before, whole = logits(server, sent), bundle.read_bytes()
    damaged = bytearray(whole)
    damaged[-2000] ^= 1
    table = bundle_of(
        task="table", output=OutputSchema(labels=("x", "y"), activation="softmax")
    ).read_bytes()
    for content, label in (
        (bytes(damaged), "FE-70"),
        (whole[:5000], "FE-702"),
        (b"", "FE-702"),
        (table, "FE-706 manifest.json: task must be 'image', got 'table'. Remedy: Give each task"),
    ):
        caplog.clear()
        bundle.write_bytes(content)
        assert [reloader.poll() for _ in range(3)] == [False] * 3
        assert label in caplog.text
        assert caplog.text.count("is refused") == 1
        assert logits(server, sent) == before
    assert server.counts.snapshot().reloads == {"refused": 4}
    bundle.unlink()
    assert not reloader.poll()
    # What was put right is taken.
    bundle.write_bytes(whole)
    assert [reloader.poll() for _ in range(2)] == [False, True]
    assert logits(server, sent) == before


def test_a_file_that_is_still_being_written_is_not_looked_into(
    running: Callable[..., Any],
    bundle_of: Callable[..., Path],
    reloader_of: Callable[[Any], Reloader],
) -> None:
    bundle = bundle_of()
    server = running(bundle)
    reloader, whole = reloader_of(server), bundle.read_bytes()
    for end in range(1000, len(whole), 1000):
        bundle.write_bytes(whole[:end])
        assert not reloader.poll()
    assert server.counts.snapshot().reloads == {}
    bundle.write_bytes(whole)
    assert [reloader.poll() for _ in range(2)] == [False, True]


def test_an_unchanged_file_is_left_alone_and_asking_loads_it_all_the_same(
    running: Callable[..., Any], image_bundle: Path, reloader_of: Callable[[Any], Reloader]
) -> None:
    server = running(image_bundle)
    reloader = reloader_of(server)
    assert not any(reloader.poll() for _ in range(3))
    assert reloader.reload()
    os.utime(image_bundle)
    assert [reloader.poll() for _ in range(3)] == [False, True, False]


def test_after_the_end_requests_are_refused(
    running: Callable[..., Any], image_bundle: Path, request_of: Callable[..., Any]
) -> None:
    server = running(image_bundle)
    server.service.served.retire()
    sent = request_of(np.ones((1, 2, 3), np.float32)).SerializeToString()
    status, text = server.refused(sent)
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert text.startswith("FE-808 server: must be running")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("killer", "FE-710 model.onnx on CPU: crashed (SIGFPE)"),
        ("nan", "FE-709 model.onnx on CPU: must give finite logits on made-up inputs"),
        ("endless", "FE-710 model.onnx on CPU: did not answer within 2 seconds"),
        ("garbage", "FE-708 model.onnx: must be an ONNX model"),
        ("nonsense", "FE-710 model.onnx on CPU: does not load"),
        ("fp32", "serving run r-2, version dddddddddddd, by model.onnx on CPU"),
    ],
)
def test_a_graph_that_would_take_the_server_along_is_refused(
    running: Callable[..., Any],
    bundle_of: Callable[..., Path],
    graph_of: Callable[..., bytes],
    graphs: dict[str, bytes],
    request_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    graph: str,
    message: str,
) -> None:
    """All of them signed."""
    monkeypatch.setattr(reference_trial, "DEADLINE", 2.0 if graph == "endless" else 120.0)
    caplog.set_level("INFO")
    server = running(bundle_of())
    reloader = Reloader(
        server.bundle,
        look(server.bundle),
        partial(server.load, rehearsed=True),
        server.service,
        server.counts,
    )
    sent = request_of(np.ones((1, 2, 3), np.float32)).SerializeToString()
    before = logits(server, sent)
    bad = graph_of((1, 2, 3), np.full((6, 3), np.nan)) if graph == "nan" else graphs[graph]
    bundle_of(bad, run="r-2", model_sha256="d" * 64)
    swapped = graph == "fp32"
    assert reloader.reload() is swapped
    assert message in caplog.text
    assert (logits(server, sent) != before) is swapped
    assert server.counts.snapshot().reloads == {"swapped" if swapped else "refused": 1}


def test_one_load_at_a_time_in_the_background_and_a_later_wish_is_kept(
    running: Callable[..., Any], image_bundle: Path, reloader_of: Callable[[Any], Reloader]
) -> None:
    server = running(image_bundle)
    gate, loads = threading.Event(), []

    def load() -> Any:
        loads.append(threading.current_thread().name)
        assert gate.wait(60)
        return server.load()

    def settled() -> None:
        end = time.monotonic() + 120
        while loading.busy:
            assert time.monotonic() < end
            time.sleep(0.01)

    reloader = Reloader(image_bundle, look(image_bundle), load, server.service, server.counts)
    loading = Background(reloader)
    loading.step(watch=True)
    assert not loading.busy  # nothing has changed
    for _ in range(3):
        loading.ask()
    loading.step(watch=True)
    assert loading.busy
    gate.set()
    settled()
    loading.step(watch=False)
    settled()
    loading.step(watch=False)
    assert not loading.busy
    assert loads == ["fedge-reload"] * 2
    assert server.counts.snapshot().reloads == {"swapped": 2}


def test_what_is_loaded_after_the_end_does_not_take_over(
    running: Callable[..., Any], image_bundle: Path, reloader_of: Callable[[Any], Reloader]
) -> None:
    server = running(image_bundle)
    reloader, old = reloader_of(server), server.service.served
    reloader.end()
    assert not reloader.reload()
    assert server.service.served is old
    assert old.enter()
    old.leave()
    assert server.counts.snapshot().reloads == {}
