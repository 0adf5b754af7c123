from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from fedge.edge.cli import main
from fedge.edge.serving import command
from fedge.shared.bundle.bundle import open_bundle, write_bundle
from fedge.shared.crypto.dsse import load_private, load_public, new_key, public_path

Capture = pytest.CaptureFixture[str]


class Server:
    """`fedge-edge serve` as a process."""

    def __init__(self, folder: Path, *words: object) -> None:
        self.log = folder / "serve.log"
        argv = [sys.executable, "-P", "-m", "fedge.edge", "serve", *map(str, words)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline().split()
        assert self.first, self.text

    @property
    def address(self) -> str:
        return self.first[2]

    @property
    def text(self) -> str:
        return self.log.read_text()

    def says(self, words: str) -> None:
        end = time.monotonic() + 120
        while words not in self.text:
            assert time.monotonic() < end, self.text
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*words: object) -> Server:
        started.append(Server(tmp_path, *words))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait(60)
        assert one.process.stdout is not None
        one.process.stdout.close()


@pytest.mark.slow
def test_a_process_serves_reloads_reports_and_ends(
    serve: Callable[..., Server],
    bundle_of: Callable[..., Path],
    trust: Path,
    images_of: Callable[..., Any],
    request_of: Callable[..., Any],
) -> None:
    bundle = bundle_of()
    server = serve(bundle, "--trust", trust, "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    assert server.first[:2] == ["listening", "on"]
    assert server.first[3] == "(plaintext)"
    assert server.process.stdout is not None
    metrics = server.process.stdout.readline().split()[-1]
    tensor = triton.InferInput("input", [1, 2, 3], "FP32")
    tensor.set_data_from_numpy(images_of(1))
    with triton.InferenceServerClient(server.address) as client:
        assert client.is_server_ready()
        assert client.infer("image", [tensor]).as_numpy("label").shape == (1,)
        before = bundle.read_bytes()
        bundle_of(run="r-2", model_sha256="c" * 64)  # in its place; seen within two looks
        server.says("serving run r-2, version cccccccccccc, by model.onnx on CPU")
        assert client.is_model_ready("image", "c" * 12)
        bundle.write_bytes(before[:-1])
        server.process.send_signal(signal.SIGHUP)
        server.says("is refused, the old one serves on: FE-70")
        assert client.infer("image", [tensor], "c" * 12).as_numpy("label").shape == (1,)
        with pytest.raises(Exception, match="FE-804"):
            x = np.full((1, 2, 3), np.nan, np.float32)
            tensor.set_data_from_numpy(x)
            client.infer("image", [tensor])
    with urllib.request.urlopen(metrics, timeout=60) as answer:  # noqa: S310 - our own
        metrics_text = answer.read().decode()
    assert 'fedge_requests_total{code="OK"} 2.0' in metrics_text
    assert 'fedge_requests_total{code="FE-804"} 1.0' in metrics_text
    assert "fedge_request_seconds_count 3.0" in metrics_text
    assert "fedge_batch_rows_sum 2.0" in metrics_text
    assert 'fedge_reloads_total{outcome="swapped"} 1.0' in metrics_text
    assert "fedge_queue_length 0.0" in metrics_text
    assert "fedge_fallbacks 0.0" in metrics_text
    assert 'backend="model.onnx on CPU"' in metrics_text
    assert 'run="r-2"' in metrics_text
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(metrics.replace("metrics", "other"), timeout=60)  # noqa: S310
    assert server.stop() == 0
    assert "Traceback" not in server.text
    assert "nan" not in server.text.lower().replace("finance", "")


@pytest.mark.slow
def test_sigterm_answers_what_has_begun(
    serve: Callable[..., Server], image_bundle: Path, trust: Path
) -> None:
    """Five requests wait for company when the signal comes, and are answered."""
    words = ("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--batch-delay", 1000)
    words = (*words, "--parallel", 1, "--deadline", 60)
    server = serve(image_bundle, "--trust", trust, *words)
    assert server.process.stdout is not None
    metrics = server.process.stdout.readline().split()[-1]
    tensor = triton.InferInput("input", [1, 2, 3], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 2, 3), np.float32))
    answers: list[Any] = []

    def wait_for(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    def waiting() -> bool:
        with urllib.request.urlopen(metrics, timeout=60) as answer:  # noqa: S310 - our own
            return b"fedge_queue_length 5.0" in answer.read()

    with triton.InferenceServerClient(server.address) as client:
        for _ in range(20):  # a busy machine may take longer for five than the first waits
            answers.clear()
            for _ in range(5):
                client.async_infer(
                    "image", [tensor], lambda result, error: answers.append((result, error))
                )
            wait_for(lambda: waiting() or len(answers) == 5)
            if not answers:
                break
            wait_for(lambda: len(answers) == 5)
        assert not answers
        assert server.stop() == 0
        wait_for(lambda: len(answers) == 5)
    assert [error for _, error in answers] == [None] * 5


@pytest.mark.slow
def test_a_port_or_address_that_cannot_be_used_is_reported_in_one_line(
    capsys: Capture, serve: Callable[..., Server], image_bundle: Path, trust: Path, tmp_path: Path
) -> None:
    server = serve(image_bundle, "--trust", trust, "--listen", "127.0.0.1:0")
    words = ["serve", str(image_bundle), "--trust", str(trust)]
    missing = str(tmp_path / "missing")
    for more, status, expected in (
        (["--listen", server.address], 1, "FE-904 --listen: "),
        (["--listen", "0.0.0.0:0"], 1, "FE-920 --listen: must be a loopback address"),
        (["--listen", "example.com:1"], 1, "FE-904 --listen: must be an IP address"),
        (["--listen", "127.0.0.1:0", "--metrics", "0.0.0.0:0"], 1, "FE-904 --metrics: "),
        (["--listen", "127.0.0.1:0", "--metrics", server.address], 1, "FE-904 --metrics: "),
        (["--tls-cert", missing], 1, "FE-920 "),
        (["--tls-cert", missing, "--tls-key", missing], 1, "FE-920 "),
        (["--max-batch", "0"], 2, "FE-102 "),
        (["--deadline", "nan"], 2, "FE-102 "),
        (["--batch-delay", "-1"], 2, "FE-102 "),
        (["--statistics", missing], 1, "FE-807 "),
    ):
        before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        try:
            assert main([*words, *more]) == status
        finally:
            for number, old in zip(
                (signal.SIGTERM, signal.SIGINT, signal.SIGHUP), before, strict=True
            ):
                signal.signal(number, old)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(expected), err
        assert err.count("\n") == 1


def test_without_the_extra_metrics_name_the_command_that_brings_it(
    capsys: Capture, image_bundle: Path, trust: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "fedge.edge.serving.metrics", raising=False)
    monkeypatch.setattr(command, "_signals", lambda: None)
    words = ["serve", str(image_bundle), "--trust", str(trust), "--metrics", "127.0.0.1:0"]
    assert main([*words, "--listen", "127.0.0.1:0"]) == 1
    assert "needs fedge with its extra `serve`" in capsys.readouterr().err


def test_a_wrong_key_serves_nothing(
    capsys: Capture, image_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_signals", lambda: None)
    new_key(tmp_path / "other")
    words = ["serve", str(image_bundle), "--trust", str(public_path(tmp_path / "other"))]
    assert main([*words, "--listen", "127.0.0.1:0"]) == 1
    assert capsys.readouterr().err.startswith("FE-703 ")


@pytest.mark.slow
def test_the_key_that_a_server_began_with_is_the_only_one(
    serve: Callable[..., Server], image_bundle: Path, trust: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.pub"
    own.write_bytes(trust.read_bytes())
    server = serve(image_bundle, "--trust", own, "--listen", "127.0.0.1:0", "--no-watch")
    new_key(tmp_path / "other")
    own.write_bytes(public_path(tmp_path / "other").read_bytes())
    verified = open_bundle(image_bundle, load_public(trust))
    write_bundle(
        image_bundle,
        verified.manifest,
        verified.artefacts,
        load_private(tmp_path / "other"),
        replace=True,
    )
    server.process.send_signal(signal.SIGHUP)
    server.says("is refused, the old one serves on: FE-703 --trust: must hold the key that")
    with triton.InferenceServerClient(server.address) as client:
        assert client.is_model_ready("image")


def status(pid: int) -> tuple[str, int]:
    """State and parent of a process; Z, a zombie, where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "Z", 0
    return fields[0], int(fields[1])


def children(pid: int) -> list[int]:
    found = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [one for one in found if status(one)[1] == pid]


def alive(pid: int) -> bool:
    return status(pid)[0] != "Z"


@pytest.mark.slow
def test_signed_graphs_that_kill_or_never_end_do_not_disturb_a_server(
    serve: Callable[..., Server],
    bundle_of: Callable[..., Path],
    trust: Path,
    graphs: dict[str, bytes],
    images_of: Callable[..., Any],
) -> None:
    bundle = bundle_of()
    server = serve(bundle, "--trust", trust, "--listen", "127.0.0.1:0", "--no-watch")
    tensor = triton.InferInput("input", [1, 2, 3], "FP32")
    tensor.set_data_from_numpy(images_of(1))
    with triton.InferenceServerClient(server.address) as client:
        bundle_of(graphs["killer"], run="r-2")
        server.process.send_signal(signal.SIGHUP)
        server.says("the old one serves on: FE-710 model.onnx on CPU: crashed (SIGFPE)")
        assert client.infer("image", [tensor]).as_numpy("label").shape == (1,)
        bundle_of(graphs["endless"], run="r-3")
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 120
        while not (trial := children(server.process.pid)):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert client.infer("image", [tensor]).as_numpy("label").shape == (1,)
    assert server.stop() == 0
    assert "did not answer" not in server.text, "it waited until the trial was given up"
    end = time.monotonic() + 120
    while any(alive(pid) for pid in trial):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert "Traceback" not in server.text


@pytest.mark.slow
def test_insecure_is_logged(serve: Callable[..., Server], image_bundle: Path, trust: Path) -> None:
    server = serve(image_bundle, "--trust", trust, "--listen", "0.0.0.0:0", "--insecure")
    server.says("WARNING --insecure: anybody on the network can read and forge")
    port = server.address.rsplit(":", 1)[1]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ready = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")
        assert ready(b"", timeout=60) == b"\x08\x01"
    os.kill(server.process.pid, signal.SIGINT)
    assert server.process.wait(60) == 0
